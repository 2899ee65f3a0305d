"""Smoothing in the latent space: the certifier ``latent``.

The scheme is that of Zeng, Su, Huang, "Certified Defense via Latent Space Randomized Smoothing with Orthogonal Encoders"
(arXiv 2108.00491); no code of theirs was found, and the local refinement is ours. Proofs: :mod:`rsplugins.lipschitz.claims`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rsplugins.arithmetic import full_precision, spoken
from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.errors import ImpossibleBudgetError, ParameterError
from rsplugins.lipschitz.analysis import Analysis, analyse
from rsplugins.lipschitz.local import local_constants, run_recording
from rsplugins.lipschitz.margins import MarginBounds, usable_constant
from rsplugins.lipschitz.rules import UnsupportedLayerError
from rsplugins.lipschitz.split import automatic_cut, cut
from rsplugins.sampling import Draw, GaussianNoise, Program, Sampler, check_independent
from rsplugins.statistics import check_budget, largest_radius

AUTO = "auto"
"""Value of ``split`` for the cut that :func:`rsplugins.lipschitz.split.automatic_cut` chooses."""

FARTHEST = 40.0
"""Standard deviations that no radius in the latent exceeds: the normal quantile of the largest number below 1 is 8.3."""

LEAST_RADIUS = 1e-3
"""A certifier that cannot reach this radius with unanimous votes is refused before sampling."""

_MARGIN_SLACK = 1e-5  # float32 logits


_PIXEL_NOISE, _ROWS = 0.25, 32
"""Of the images on which it is checked that the network treats each by itself."""


class LatentParameters(CertifierParameters):
    """What the user may set of ``latent``."""

    split: str = Field(
        "", description="layer whose output is the latent, or 'auto'; `rsplugins lipschitz MODEL` lists them with their bounds"
    )
    sigma: float = Field(0.5, gt=0, description="standard deviation of the noise, in units of the latent")
    n0: int = Field(100, ge=1, description="selection samples, which choose the class and are then set aside")
    n: int = Field(10_000, ge=1, description="estimation samples")
    alpha: float = Field(0.001, gt=0, lt=1, description="probability of a false certificate, for one input")
    gammas: tuple[float, ...] = Field((), description="radii of balls, on raw pixels, for a local bound of the encoder")
    margin: bool = Field(True, description="also gather the plain classifier's margin certificate where it has one")

    @field_validator("gammas")
    @classmethod
    def _positive(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if any(radius <= 0 for radius in radii):
            raise ValueError("every radius must be above 0")
        return radii


class Latent(Certifier[LatentParameters]):
    """Certified l2 radii on raw pixels from Gaussian noise in the latent: the encoder runs once an input, the head n times.

    The radius in the latent is divided by an upper bound of the encoder's Lipschitz constant, which includes the Classifier's own
    normalisation. What is certified is the classifier that predicts with noise in the latent.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`LatentParameters`.
        execution: how to run the model.

    Raises:
        ParameterError: ``split`` is missing (listing the cuts), or the bound of the encoder is zero, infinite or NaN.
        UnsupportedLayerError: a layer of the encoder has no bound; names the nearest cut that works.
        UsageError: the network cannot be copied, or not be cut there; see :func:`rsplugins.lipschitz.split_at`.
        ImpossibleBudgetError: unanimous votes would not give a radius above 1e-3, with the number.
    """

    Parameters = LatentParameters

    def __init__(self, classifier: Classifier, parameters: LatentParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        p = parameters
        check_budget(p.n, sigma=p.sigma, alpha=p.alpha)
        self.analysis = analyse(classifier)
        if not p.split:
            raise _no_split(self.analysis)
        self.cut = automatic_cut(self.analysis, classifier) if p.split == AUTO else cut(self.analysis, classifier, p.split)
        self.split = self.cut.layer
        self.lipschitz = usable_constant(self.analysis.constant(self.cut.node), f"of the encoder that ends at {self.split!r}")
        # A larger constant holds too, and keeps radii where the constants hold: none is above FARTHEST sigma over the constant.
        self.lipschitz = max(self.lipschitz, FARTHEST * p.sigma / self.analysis.reach)
        _check_reach(p, self.split, self.lipschitz)
        self.margins = _margins(self.analysis) if p.margin else None
        noise = GaussianNoise(p.sigma, execution.seed)
        # The head casts nothing, unlike a Classifier; weights coarser than float32 were refused above.
        head, device, dtype = self.cut.split.head, classifier.device, classifier.dtype
        self.sampler = Sampler(head, noise, classifier.num_classes, execution, device=device, dtype=dtype)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield votes and bounds, in the form that :func:`rsplugins.lipschitz.claims.latent` documents.

        Raises:
            UsageError: the weights have changed since the certifier was made; or what the network returns for an image depends on
                the rest of its batch, or on earlier calls.
        """
        spent: dict[int, float] = {}

        def work() -> Iterator[tuple[int, Tensor, Program]]:
            for place, (index, image) in enumerate(inputs):
                start = time.perf_counter()
                if place == 0:
                    # The sampler sees the head alone, and the halves were traced: what the network remembers is not in them.
                    item = image.to(self.classifier.device)
                    check_independent(self.classifier, index, item, self.execution, sigma=_PIXEL_NOISE, rows=_ROWS)
                latent, extra = self._encode(image)
                spent[index] = time.perf_counter() - start
                yield index, latent, self._program(extra)

        for gathered in self.sampler.run(work()):
            yield replace(gathered, seconds=gathered.seconds + spent.pop(gathered.index, 0.0))

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the function that is certified, as JSON values."""
        return {
            **self.sampler.describe(),
            "split": self.split,
            "encoder_arithmetic": self._encoder_arithmetic(),
            "lipschitz": self.lipschitz,
            "encoder_share": round(self.cut.share, 4),
            "head_normalises": list(self.cut.renormalises),
        }

    @full_precision()
    def _encode(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the latent (without a batch dimension) and the bounds that go into the evidence."""
        self.analysis.check_unchanged(self.classifier)
        extra: dict[str, Any] = {"lipschitz": self.lipschitz}
        if self.cut.renormalises:
            extra["head_normalises"] = list(self.cut.renormalises)
        encoder, head = self.cut.split
        batch = image[None].to(self.classifier.device)
        with torch.inference_mode():
            if self.parameters.gammas:
                latent, seen = run_recording(self.analysis, self.cut.node, batch)
                gammas = [gamma for gamma in self.parameters.gammas if gamma <= self.analysis.reach]
                constants = local_constants(self.analysis, self.cut.node, seen, gammas)
                extra["local"] = [list(pair) for pair in zip(gammas, constants, strict=True)]
            else:
                latent = encoder(batch)
            if self.margins is not None:
                # On a copy: a head may write in place into what it is given.
                extra["margin"] = self.margins.evidence(head(latent.clone())[0], _MARGIN_SLACK)
        return latent[0], extra

    @full_precision()
    def _encoder_arithmetic(self) -> str:
        return spoken(self.classifier.device, self.classifier.dtype)

    def _program(self, extra: Mapping[str, Any]) -> Program:
        p = self.parameters
        selection = yield Draw(0, p.n0)
        estimation = yield Draw(p.n0, p.n0 + p.n)
        return {"selection": selection.votes(), "estimation": estimation.votes(), **extra}


def _margins(analysis: Analysis) -> MarginBounds | None:
    """Return the margin bounds of the whole network, or None where it has none: they are an extra here."""
    try:
        return MarginBounds(analysis)
    except (UnsupportedLayerError, ParameterError):
        return None


def _check_reach(p: LatentParameters, split: str, lipschitz: float) -> None:
    # A ball of the local refinement can reach further than the global bound, but who asks for one says how far.
    best = largest_radius(p.n, sigma=p.sigma, alpha=p.alpha, divide_by=lipschitz)
    if best > LEAST_RADIUS or any(gamma > LEAST_RADIUS for gamma in p.gammas):
        return
    raise ImpossibleBudgetError(
        f"The encoder that ends at {split!r} has Lipschitz bound {lipschitz:.6g}; with sigma={p.sigma:g} and {p.n} unanimous "
        f"votes the radius would be {best:.3g} on raw pixels, not above {LEAST_RADIUS:g}.",
        cause="every layer multiplies the bound, and the normalisation by 1/std does too.",
        fix=f"Cut earlier (`rsplugins lipschitz MODEL` shows where), train an encoder with a small bound, or use sigma of at "
        f"least {p.sigma * LEAST_RADIUS / best:.3g} with a head trained for it.",
    )


def _no_split(analysis: Analysis) -> ParameterError:
    cuts = [layer for layer, node in analysis.cut_nodes().items() if node in analysis.values]
    return ParameterError(
        "latent needs split=LAYER, the layer whose output the noise is added to.",
        cause="where to cut depends on what the head was trained for.",
        fix=f"Set split to 'auto', or to one of {', '.join(map(repr, cuts[:12]))}; `rsplugins lipschitz MODEL` shows "
        "their bounds and costs.",
    )
