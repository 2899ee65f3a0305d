"""What a plugin hands to the host: frozen descriptions, cheap to import, that name the heavy parts without importing them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from rsplugins.certificate import Guarantee, Norm, Threat

API_VERSION = 1
"""Version of the descriptors and hooks. A plugin module states the one it was written for as ``RSPLUGINS_API = 1``."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Descriptor:
    """Base of all descriptors.

    Attributes:
        name: lower-case letters, digits and hyphens; unique among its kind over all installed plugins.
        summary: one line for lists.
        factory: ``"module:attribute"`` of the heavy object; imported only when it is used.
        requires: optional distributions the factory needs, as requirement strings such as ``"auto-LiRPA>=0.3"``. When one is
            missing the plugin is listed as unavailable with the line that installs it.

    Raises:
        ValueError: when a field is malformed; the host turns it into a failed plugin with this text.
    """

    kind: ClassVar[str] = "plugin"

    name: str
    summary: str
    factory: str
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check(
            "name", isinstance(self.name, str) and bool(_NAME.fullmatch(self.name)), "lower-case letters, digits, hyphens"
        )
        self._check("summary", isinstance(self.summary, str) and len(self.summary.strip().splitlines()) == 1, "one line of text")
        self._check_reference("factory", self.factory)
        is_texts = isinstance(self.requires, tuple) and all(isinstance(text, str) for text in self.requires)
        self._check("requires", is_texts, "a tuple of requirement strings")

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}; expected {expected}")

    def _check_reference(self, field: str, value: Any) -> None:
        self._check(field, isinstance(value, str) and bool(_REFERENCE.fullmatch(value)), '"module:attribute"')


@dataclass(frozen=True)
class CertifierDescriptor(Descriptor):
    """A certifier: the factory is a subclass of :class:`rsplugins.certifier.Certifier`.

    Attributes:
        guarantee: the guarantee of its claims with default parameters.
        norms: the norms it can state radii in.
        claim: ``"module:attribute"`` of the torch-free function (evidence, parameters) -> Claim.
        default: whether ``rsplugins certify`` runs it when no method is named.
        labelled: whether it is told the true class of each input. Only a method that certifies and estimates nothing may be.
    """

    kind: ClassVar[str] = "certifier"

    guarantee: Guarantee = Guarantee.ESTIMATE
    norms: tuple[Norm | Threat, ...] = ()
    claim: str = ""
    default: bool = True
    labelled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("guarantee", isinstance(self.guarantee, Guarantee), "a Guarantee")
        enough = isinstance(self.norms, tuple) and (len(self.norms) > 0 or self.guarantee is Guarantee.NONE)
        self._check(
            "norms", enough and all(isinstance(norm, (Norm, Threat)) for norm in self.norms), "a tuple of at least one Norm"
        )
        self._check_reference("claim", self.claim)
        blind = self.guarantee in (Guarantee.EMPIRICAL, Guarantee.NONE)
        self._check("labelled", self.labelled is False or (self.labelled is True and blind), "False where a radius is promised")


@dataclass(frozen=True)
class ModelSourceDescriptor(Descriptor):
    """Where Classifiers come from; ``name`` is the scheme of ``scheme:reference``.

    The factory is a function ``(reference: str, **options) -> Classifier``.
    """

    kind: ClassVar[str] = "model-source"


@dataclass(frozen=True)
class DatasetDescriptor(Descriptor):
    """Where inputs come from; the factory is a function ``(reference: str, *, root, split) -> rsplugins.data.Dataset``.

    Attributes:
        argument: what follows the colon in ``name:ARGUMENT``; empty when the name stands alone.
    """

    kind: ClassVar[str] = "dataset"

    argument: str = ""


@dataclass(frozen=True)
class BoundOperatorDescriptor(Descriptor):
    """An auto-LiRPA operator: the factory is a Bound class, applied through ``custom_ops`` of one BoundedModule.

    One that is not elementwise has to say its rounding, by ``interval_rounding`` and ``linear_rounding``: see docs/hooks.md.

    Attributes:
        operator: the ONNX name it bounds, such as ``"onnx::Elu"``; where auto-LiRPA has bounds of its own, these replace them.
        guarantee: of the bounds it computes. Certifiers with a guarantee take DETERMINISTIC ones only.
        default: whether every bound certifier takes it where a network has that operator; otherwise only those that name it.
    """

    kind: ClassVar[str] = "bound-operator"

    operator: str = ""
    guarantee: Guarantee = Guarantee.ESTIMATE
    default: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.operator, str) and self.operator.count("::") == 1
        self._check("operator", good, 'an operator name such as "onnx::Gemm"')
        self._check("guarantee", isinstance(self.guarantee, Guarantee), "a Guarantee")


@dataclass(frozen=True)
class MomentRuleDescriptor(Descriptor):
    r"""What an auto-LiRPA operator does to a Gaussian; the factory is a function from a ``rsplugins.moments.rules.Site``.

    Attributes:
        operator: the class name of auto-LiRPA's operator, such as ``"BoundSoftplus"``; comes before a built-in rule for it.
            One that auto-LiRPA does not have is traced by the rule's own ``forward``, from the node and its inputs.
    """

    kind: ClassVar[str] = "moment-rule"

    operator: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.operator, str) and self.operator.isidentifier()
        self._check("operator", good, 'a class name such as "BoundSoftplus"')


@dataclass(frozen=True)
class DenoiserDescriptor(Descriptor):
    """Where denoisers come from; ``name`` is the scheme of ``scheme:reference``.

    The factory is a function ``(reference: str, **options) -> nn.Module``: from noisy raw [0, 1] pixels (B, C, H, W), and the
    noise level (B, 1, 1, 1) where its forward takes a second argument ``sigma``, to an image of the same shape.
    """

    kind: ClassVar[str] = "denoiser"


@dataclass(frozen=True)
class TrainingHookDescriptor(Descriptor):
    """A training hook: the factory makes an object with the methods that ``rsplugins.training`` calls."""

    kind: ClassVar[str] = "training-hook"
