"""What a result is: a typed claim, the evidence it was computed from, and where both came from.

This module imports neither torch nor numpy: a claim can be read and recomputed anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Any

from rsplugins.rounding import round_down

Evidence = Mapping[str, Any]
"""What a claim was computed from, as plain JSON values: vote counts by class, score sums, bounds, a Lipschitz factor.

Evidence is enough to recompute the claim without the model, with the certifier's ``claim`` function.
"""


CLIPPED = "clipped: of the ball cut with the box [0, 1] of images; nothing is claimed of points of the ball outside of it"
"""The assumption of a claim that holds in a part of its ball only: an attack that leaves [0, 1] is no counterexample."""

BESIDE = "the plain classifier, another function"
"""Begins what a claim says besides, of one input alone; it is no assumption of the claim."""


class _Text(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class Guarantee(_Text):
    """What a radius promises.

    Example:
        >>> Guarantee("probabilistic").certifies, Guarantee.ESTIMATE.certifies
        (True, False)
    """

    DETERMINISTIC = "deterministic"
    """Holds for every input in the ball."""
    PROBABILISTIC = "probabilistic"
    """Holds with confidence 1 - alpha over the sampler's coins."""
    ESTIMATE = "estimate"
    """Holds in expectation or under a model only; never a certificate."""
    EMPIRICAL = "empirical"
    """Survived an attack; never a certificate."""
    NONE = "none"
    """Nothing is promised, of no radius: a prediction."""

    @property
    def certifies(self) -> bool:
        """Whether a radius with this guarantee may stand in a column headed "certified"."""
        return self in (Guarantee.DETERMINISTIC, Guarantee.PROBABILISTIC)


class Norm(_Text):
    """The norm in which a radius is measured.

    Example:
        >>> Norm("Linf"), Norm("inf"), Norm(2)
        (<Norm.LINF: 'linf'>, <Norm.LINF: 'linf'>, <Norm.L2: 'l2'>)
    """

    L1 = "l1"
    L2 = "l2"
    LINF = "linf"

    @property
    def is_lp(self) -> bool:
        """Whether it is the distance in a norm, as no :class:`Threat` is."""
        return True

    @classmethod
    def _missing_(cls, value: object) -> Norm | None:
        """Read other spellings, as the field's scripts write them."""
        name = str(value).lower().removeprefix("l").removeprefix("_")
        return {"1": cls.L1, "2": cls.L2, "inf": cls.LINF, "infinity": cls.LINF}.get(name)


class Threat(_Text):
    """What else than the distance in a norm an adversary may do, where a radius is its size.

    Example:
        >>> Threat("patch").is_lp, Norm.L2.is_lp
        (False, True)
    """

    PATCH = "patch"
    """One square of the image is filled with anything; the size is its side in pixels."""

    @property
    def is_lp(self) -> bool:
        """Whether it is the distance in a norm: it is not."""
        return False


def threat(name: object) -> Norm | Threat:
    """Return the norm or other threat of a name, as records have it.

    Example:
        >>> threat("linf"), threat("patch")
        (<Norm.LINF: 'linf'>, <Threat.PATCH: 'patch'>)

    Raises:
        ValueError: there is none.
    """
    return Threat(name) if name in {str(each) for each in Threat} else Norm(name)


def axis_text(name: str) -> str:
    """Return what a radius of a norm or threat is, for axes and columns.

    Example:
        >>> axis_text("l2"), axis_text("patch")
        ('l2 radius on raw [0, 1] pixels', 'side of a patch in pixels')
    """
    return "side of a patch in pixels" if name == str(Threat.PATCH) else f"{name} radius on raw [0, 1] pixels".strip()


@dataclass(frozen=True)
class Claim:
    """What a certifier's ``claim`` function reads out of evidence, without the model.

    Attributes:
        prediction: the certified class, or None for an abstention.
        radius: in the norm ``norm``, on the raw [0, 1] pixels of the image that the user passed in; 0.0 for an abstention;
            already rounded down.
        guarantee: what the radius promises.
        norm: the norm of the radius, or the threat whose size it is.
        alpha: the probability of a false claim that was spent on this input; None unless PROBABILISTIC.
        rule: the theorem and bound that the claim rests on, such as ``"cohen-2019/clopper-pearson"``.
        assumptions: what must hold besides, in words, such as ``"float-idealised"``.
    """

    prediction: int | None
    radius: float
    guarantee: Guarantee
    norm: Norm | Threat
    alpha: float | None
    rule: str
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gathered:
    """The evidence for one input and what it cost, as a certifier's ``gather`` yields it.

    Attributes:
        index: the input's stable index in its data set.
        evidence: plain JSON values; see :data:`Evidence`. Empty when ``error`` is set.
        samples: how many noisy (or otherwise perturbed) forward passes were spent on this input.
        seconds: the input's share of the wall-clock time.
        error: why this input could not be processed, when it could not; it is then recorded as failed, not as abstained.
    """

    index: int
    evidence: Evidence
    samples: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Certificate:
    """The result for one input.

    Attributes:
        index: the input's stable index.
        method: the certifier's name.
        prediction: the class, or None when the certifier abstains.
        radius: on raw [0, 1] pixels in ``norm``; 0.0 when it abstains; rounded down.
        guarantee: what the radius promises: deterministic, probabilistic, estimate or empirical.
        norm: the norm of the radius, or the threat whose size it is.
        alpha: the probability of a false claim spent on this input; None unless probabilistic.
        samples: noisy forward passes spent on this input.
        seconds: wall-clock time spent on this input.
        evidence: what the claim was computed from.
        parameters: the certifier's parameters, sigma among them where there is one.
        function: which function the claim is about: weights sha256, dtype, what changed it (compile, bf16).
        rule: the theorem and bound that the claim rests on.
        assumptions: what must hold besides.
        space: where the radius lives; raw pixels unless a certifier says otherwise.
        error: why the input failed, when it failed; prediction is then None and the radius 0.0.
    """

    index: int
    method: str
    prediction: int | None
    radius: float
    guarantee: Guarantee
    norm: Norm | Threat
    alpha: float | None
    samples: int
    seconds: float
    evidence: Evidence
    parameters: Mapping[str, Any] = field(default_factory=dict)
    function: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""
    assumptions: tuple[str, ...] = ()
    space: str = "raw [0, 1] pixels"
    error: str | None = None

    @property
    def abstained(self) -> bool:
        """Whether the certifier made no claim although the input was processed."""
        return self.prediction is None and self.error is None

    def __str__(self) -> str:
        if self.error is not None:
            return f"input {self.index}: failed: {self.error}"
        if self.prediction is None:
            return f"input {self.index}: {self.method} abstains ({self.guarantee})"
        verb = "certified" if self.guarantee.certifies else str(self.guarantee)
        confidence = f", alpha={self.alpha:g}" if self.alpha is not None else ""
        if self.guarantee is Guarantee.NONE:
            return f"input {self.index}: class {self.prediction} (no guarantee)"
        if self.radius == 0 and self.guarantee.certifies:
            what = f"{self.norm} radius" if self.norm.is_lp else str(self.norm)
            return f"input {self.index}: class {self.prediction}, no certified {what} ({self.guarantee}{confidence})"
        # Rounded down: the usual print would claim more than was proven.
        digits = round_down(self.radius, 6) if isfinite(self.radius) else self.radius
        radius = f"{verb} {self.norm} radius {digits}" if self.norm.is_lp else f"{verb} {self.norm} side {digits} pixels"
        return f"input {self.index}: class {self.prediction}, {radius} ({self.guarantee}{confidence})"
