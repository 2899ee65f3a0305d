"""Certifiers from bounds of the network's margins: ``ibp``, ``crown-ibp``, ``crown``, ``alpha-crown``, ``etb``, ``sound-etb``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rsplugins.arithmetic import full_precision, spoken
from rsplugins.certificate import Gathered, Norm
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.lirpa import claims
from rsplugins.lirpa.bridge import Operators
from rsplugins.lirpa.diagnosis import FixedBatchError, NotBoundedError
from rsplugins.lirpa.exported import CheckedBounds
from rsplugins.lirpa.graph import check_batch_sizes, check_module
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.operators import ETB, PASS_THROUGH, SOUND_ETB, PluginOperators
from rsplugins.lirpa.search import Margins, Search
from rsplugins.machine.device import is_out_of_memory

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class BoundParameters(CertifierParameters):
    """Parameters of the bound certifiers.

    Attributes:
        norm: of the ball, on raw [0, 1] pixels.
        eps: the radius to verify; without it, the largest certified one is searched for.
        max_eps: no larger radius is searched for.
        tolerance: how far the radius found may be below the largest one that the method certifies there.
        clip: intersect the ball with the [0, 1] box, outside which there is no image.
        precision: which the bounds are computed in; float32 with more slack.
        exclude: names of plugins' bound operators that are left alone; ``rsplugins plugins list --kind bound-operator``.
    """

    norm: Norm = Norm.LINF
    eps: float | None = Field(default=None, gt=0)
    max_eps: float = Field(default=0.5, gt=0)
    tolerance: float = Field(default=1e-4, gt=0)
    clip: bool = True
    precision: Literal["float64", "float32"] = "float64"
    exclude: tuple[str, ...] = ()

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_name(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @model_validator(mode="after")
    def _within_pixels(self) -> BoundParameters:
        if self.norm is Norm.LINF and self.eps is not None and self.eps > 1:
            raise ValueError(
                f"eps is {self.eps:g} in linf, more than all images are apart; allowed: up to 1, on the scale of [0, 1] pixels; "
                f"did you mean {self.eps:g}/255 = {self.eps / 255:.4g}?"
            )
        return self


class BoundCertifier(Certifier[BoundParameters]):
    """Base of the bound certifiers: evidence is the clean logits and the margins' lower bounds around the radius found.

    Raises:
        ParameterError, UsageError, CheckpointError: by the constructor, when the model cannot be bounded; the layer is named.
        PluginError: a plugin's operator that the model needs cannot be imported, or two plugins bring it.
    """

    Parameters = BoundParameters
    method: ClassVar[str] = "ibp"
    exported: str = ""
    """The method of :class:`rsplugins.aten.bounds.ExportedBounds` that stands in where auto-LiRPA has no right bounds."""
    slack_dtype: ClassVar[str] = ""

    def __init__(self, classifier: Classifier, parameters: BoundParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        if execution.dtype != "float32":
            raise ParameterError(
                f"Bounds do not hold for a model run in {execution.dtype}.",
                cause="they bound the network in exact arithmetic, of which bfloat16 is too coarse a copy.",
                fix="Run this method with dtype float32.",
            )
        _check_weights(classifier)
        check_module(classifier)
        self._network: BoundNetwork | CheckedBounds | None = None
        self._search: Search | None = None
        self._operators = self.operators()
        if classifier.input_size is not None:
            self._prepare(torch.zeros(1, *classifier.input_size))

    def operators(self) -> Operators:
        """Return the operators that the network is bounded with besides auto-LiRPA's: those of plugins that hold for sure."""
        return PluginOperators(exclude=self.parameters.exclude)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield logits and margins' lower bounds, a batch of inputs at a time."""
        size = 16 if self.execution.batch_size == "auto" else self.execution.batch_size
        stream = iter(inputs)
        while batch := list(islice(stream, size)):
            start = time.perf_counter()
            try:
                found = self._evidence(torch.stack([item.image for item in batch]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                text = f"out of memory with one input and one specification row at a time: {str(error).splitlines()[0]}"
                yield from (Gathered(item.index, {}, 0, 0.0, error=text) for item in batch)
                continue
            seconds = (time.perf_counter() - start) / len(batch)
            for item, evidence in zip(batch, found, strict=True):
                yield Gathered(item.index, evidence, samples=0, seconds=seconds)

    @full_precision()
    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the bounds, as JSON values."""
        said: dict[str, Any] = {"arithmetic": spoken(self.classifier.device, self.parameters.precision)}
        if isinstance(self._network, CheckedBounds):
            said["graph"] = "torch.export"
        elif self._network is not None and isinstance(self._operators, PluginOperators):
            said["operators"] = self._operators.took_part
        return said

    def _prepare(self, images: Tensor) -> tuple[BoundNetwork | CheckedBounds, Search]:
        if self._network is None or self._search is None:
            self._network = self._bounded(images)
            batch = 16 if self.execution.batch_size == "auto" else self.execution.batch_size
            few = self.method == "alpha-crown"
            self._search = Search(Margins(self._margins, batch), self.parameters.precision, self.slack_dtype, few=few)
        return self._network, self._search

    def _bounded(self, images: Tensor) -> BoundNetwork | CheckedBounds:
        """Return the network with bounds that have passed their check, by auto-LiRPA, or where that has none by torch.export."""
        exported = self.exported
        try:
            return self._by_auto_lirpa(images, explain=not exported)
        except (NotBoundedError, FixedBatchError):
            if not exported or (isinstance(self._operators, PluginOperators) and self._operators.strangers):
                raise
        check_batch_sizes(self.classifier, images)  # bounds there are of one image alone
        try:
            network = CheckedBounds(self.classifier, images, dtype=DTYPES[self.parameters.precision])
            self._check(network, exported)
        except ParameterError:
            self._by_auto_lirpa(images, explain=True)  # names the layer
            raise
        self._operators = {}
        return network

    def _by_auto_lirpa(self, images: Tensor, *, explain: bool) -> BoundNetwork:
        network = BoundNetwork(
            self.classifier,
            images,
            operators=self._operators,
            dtype=DTYPES[self.parameters.precision],
            iterations=getattr(self.parameters, "iterations", 20),
            explain=explain,
        )
        self._check(network, self.method)
        return network

    def _check(self, network: BoundNetwork | CheckedBounds, method: str) -> None:
        try:
            network.check(method, self.parameters.norm, clip=self.parameters.clip)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # otherwise the first input says so, and nothing is certified before a check has passed

    def _margins(self, images: Tensor, eps: Tensor, specification: Tensor) -> Tensor:
        assert self._network is not None  # _prepare made it before the search that calls this
        lower, _ = self._network.bounds(
            images,
            eps,
            norm=self.parameters.norm,
            method=self.exported if isinstance(self._network, CheckedBounds) else self.method,
            clip=self.parameters.clip,
            specification=specification,
            upper=False,
        )
        return lower

    def _evidence(self, images: Tensor) -> list[dict[str, Any]]:
        network, search = self._prepare(images)
        context = torch.enable_grad() if self.method == "alpha-crown" else torch.no_grad()
        with context:
            logits = network.logits(images).detach()
            self.classifier.check_logits(logits, batch=len(images))
            p = self.parameters
            if p.eps is not None:
                found = search.at(images, logits, p.eps)
            else:
                found = search.largest(images, logits, p.max_eps, p.tolerance)
        strangers = self._operators.strangers if isinstance(self._operators, PluginOperators) else []
        said: dict[str, Any] = {"rounding": claims.OUTWARD} if network.rounds_outward else {}
        said |= {"operators": strangers} if strangers else {}
        return [{**evidence, **said} for evidence in found]


def _check_weights(classifier: Classifier) -> None:
    for name, tensor in (*classifier.module.named_parameters(), *classifier.module.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
            raise ParameterError(
                f"The network's weights are {str(tensor.dtype).removeprefix('torch.')} ({name}); the bounds do not hold for it.",
                cause="they bound the network in exact arithmetic, of which this format is too coarse a copy.",
                fix="Convert it with classifier.float().",
            )


class Ibp(BoundCertifier):
    """Interval bound propagation. DETERMINISTIC."""

    exported = "ibp"


class CrownIbp(BoundCertifier):
    """CROWN for the margins, interval bounds in between. DETERMINISTIC."""

    method = exported = "crown-ibp"


class Crown(BoundCertifier):
    """CROWN throughout. DETERMINISTIC."""

    method = "crown"


class AlphaCrownParameters(BoundParameters):
    """Parameters of ``alpha-crown``.

    Attributes:
        iterations: of the slopes, at most; an input stops when it is certified, or no longer improves.
    """

    iterations: int = Field(default=20, ge=1)


class AlphaCrown(BoundCertifier):
    """CROWN with slopes optimised for each input. DETERMINISTIC; slow."""

    Parameters = AlphaCrownParameters
    parameters: AlphaCrownParameters
    method = "alpha-crown"
    slack_dtype = "float32"


class EtbParameters(BoundParameters):
    """Parameters of ``etb``.

    Attributes:
        variant: ``"blocks"``, block by block through the network; or ``"whole"``, one masked Jacobian of all of it (linf only).
    """

    variant: Literal["blocks", "whole"] = "blocks"


class Etb(BoundCertifier):
    """Expected tight bounds. ESTIMATE: they can be too tight, and never certify anything."""

    Parameters = EtbParameters
    parameters: EtbParameters

    def __init__(self, classifier: Classifier, parameters: EtbParameters, execution: Execution) -> None:
        if parameters.variant == "whole" and parameters.norm is not Norm.LINF:
            raise ParameterError(
                f"etb with variant=whole has no {parameters.norm} ball.",
                cause="the method is defined for boxes.",
                fix="Use norm=linf, or variant=blocks.",
            )
        super().__init__(classifier, parameters, execution)

    def operators(self) -> Operators:
        """Return ETB's operators, or none of them for the whole-network variant, which starts from interval bounds."""
        named = ETB if self.parameters.variant == "blocks" else ()
        return PluginOperators(named, estimates=True, exclude=self.parameters.exclude)

    def _margins(self, images: Tensor, eps: Tensor, specification: Tensor) -> Tensor:
        if self.parameters.variant == "blocks":
            return super()._margins(images, eps, specification)
        from rsplugins.lirpa.whole_network import whole_network_bounds

        assert isinstance(self._network, BoundNetwork)  # etb has no other
        return whole_network_bounds(
            self._network, images, eps, clip=self.parameters.clip, specification=specification.to(self._network.dtype)
        )[0]


class SoundEtbParameters(BoundParameters):
    """Parameters of ``sound-etb``.

    Attributes:
        slope: of unstable neurons: ``"chord"``, or ``"pass"`` for a pass-through as in ETB itself, which is looser.
    """

    slope: Literal["chord", "pass"] = "chord"


class SoundEtb(BoundCertifier):
    """Expected tight bounds made sound, block by block, never wider than interval bounds. DETERMINISTIC."""

    Parameters = SoundEtbParameters
    parameters: SoundEtbParameters

    def __init__(self, classifier: Classifier, parameters: SoundEtbParameters, execution: Execution) -> None:
        self.exported = "sound-etb" if parameters.slope == "chord" else ""
        super().__init__(classifier, parameters, execution)

    def operators(self) -> Operators:
        """Return sound ETB's operators."""
        named = SOUND_ETB if self.parameters.slope == "chord" else PASS_THROUGH
        return PluginOperators(named, exclude=self.parameters.exclude)
