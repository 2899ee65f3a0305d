"""Smooth-Reduce: certify by classifying overlapping patches or sub-videos and reducing their scores.

Source: Joshi, Pham, Cho, Boytsov, Condessa, Kolter, Hegde, "Smooth-Reduce: Leveraging Patches for Improved Certified Robustness"
(arXiv 2205.06154). Where this departs from the paper, and why: :mod:`rsplugins.reduction.claims`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from rsplugins import doubts
from rsplugins.certificate import Gathered
from rsplugins.certifier import LARGEST_SIGMA, Certifier, CertifierParameters, Execution, Input
from rsplugins.errors import ParameterError, RspluginsError
from rsplugins.reduction import claims
from rsplugins.reduction.function import Lift, Reduced
from rsplugins.reduction.plan import LIFTED_NOISE, Plan, make_plan
from rsplugins.sampling import Draw, Program, Sampler, check_independent, gaussian_noise, grid_evidence
from rsplugins.statistics import bonferroni, check_budget

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier


_ROWS = 32
"""Windows beside each other when it is checked that they do not depend on each other."""


class SmoothReduceParameters(CertifierParameters):
    """Parameters of ``smooth-reduce``.

    Attributes:
        sigma: standard deviation of the Gaussian noise, in raw pixels.
        n0: samples that choose the class.
        n: fresh samples that make the claim; one sample is one noisy forward pass of every window.
        alpha: probability of a false certificate, for each input.
        noise: ``common`` (one noise on the raw image), ``independent`` (one on every window; the radius is divided by the norm of
            the lifted map), ``soft`` (scores instead of votes), ``as-published`` (independent, undivided: an ESTIMATE).
        soft_noise: for ``soft``: noise on the raw image, or on every window.
        reduce: mean, max or min over the windows, by class.
        scores: reduce logits or probabilities.
        window: side of a patch, or frames of a sub-video; None is the size that the classifier takes.
        stride: step between neighbouring windows; None places three along each axis.
        number: how many windows to keep, spread as far apart as possible; None keeps all.
        resize: side that the image is resized to first; ``"none"``; or ``"auto"``, 9/8 of the side where there would be room for
            one window only (the paper's 36 for CIFAR's 32).
        bound: for ``soft``: the bound on the mean score.
    """

    sigma: float = Field(default=0.25, gt=0, le=LARGEST_SIGMA)
    n0: int = Field(default=100, ge=1)
    n: int = Field(default=10_000, ge=1)
    alpha: float = Field(default=0.001, gt=0, lt=1)
    noise: Literal["common", "independent", "soft", "as-published"] = "common"
    soft_noise: Literal["common", "independent"] = "common"
    reduce: Literal["mean", "max", "min"] = "mean"
    scores: Literal["logits", "probabilities"] = "probabilities"
    window: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    number: int | None = Field(default=None, ge=1)
    resize: Annotated[int, Field(ge=1)] | Literal["auto", "none"] = "auto"
    bound: Literal["empirical-bernstein", "hoeffding"] = "empirical-bernstein"


class SmoothReduce(Certifier[SmoothReduceParameters]):
    """The certifier; PROBABILISTIC but for ``as-published``.

    Args:
        classifier: takes one patch (C, h, w), or one chunk of frames (C, t, H, W).
        parameters: see :class:`SmoothReduceParameters`.
        execution: how to run the model; ``batch_size`` counts windows, not samples.
    """

    Parameters = SmoothReduceParameters
    samples_soundly = True

    def __init__(self, classifier: Classifier, parameters: SmoothReduceParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        self._values = parameters.model_dump()
        check_budget(parameters.n, sigma=parameters.sigma, alpha=self._alpha(), bound=self._bound())
        self._lifted = parameters.noise in LIFTED_NOISE or (parameters.noise == "soft" and parameters.soft_noise == "independent")
        if execution.sound and self._lifted:
            raise ParameterError(
                f"smooth-reduce with noise={parameters.noise} has no sound mode.",
                cause="its noise is added to windows of a resized image, which is on no grid.",
                fix="Use noise=common, or noise=soft with soft_noise=common.",
            )

    def check_images(self, images: torch.Tensor) -> None:
        """Check values and layout; the size may be larger than the classifier's own, since windows are cut from it."""
        self.classifier.check_images(images, any_size=True)

    def plan(self, shape: Iterable[int]) -> Plan:
        """Return the windows for raw inputs of one shape, (C, H, W) or (C, T, H, W).

        Raises:
            ParameterError: when the windows do not fit.
        """
        shape, own = tuple(shape), self.classifier.input_size
        side = self.parameters.window
        if own is not None:
            return make_plan(shape, own[1:2] if len(shape) == 4 else own[1:], self._values)
        if side is not None:
            return make_plan(shape, (side,) if len(shape) == 4 else (side, side), self._values)
        raise ParameterError(
            "The size of a window is not known.",
            cause="window is not set and the classifier does not say what it takes.",
            fix="Set window=..., or give wrap() an input_size.",
        )

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """See :meth:`Certifier.gather`. An input whose windows do not fit is yielded as failed; the rest goes on."""
        source = iter(inputs)
        failed: dict[int, str] = {}
        plan, head = self._first_plan(source, failed)
        if plan is None:
            yield from (Gathered(index, {}, 0, 0.0, error=error) for index, error in failed.items())
            return
        lift = Lift(plan.windows, plan.resize)
        sampler = self._sampler(*self._function(plan, lift))
        self._check_windows(plan, lift, head[0])

        def work() -> Iterator[tuple[int, torch.Tensor, Program]]:
            blank = torch.zeros((len(plan.windows.positions), *plan.item_shape) if self._lifted else plan.shape)
            for index in failed:
                yield index, blank, _fail()
            for index, image in head:
                yield index, self._item(lift, image), self._program(plan)
            for index, image in source:
                if tuple(image.shape) == plan.shape:
                    yield index, self._item(lift, image), self._program(plan)
                    continue
                failed[index] = f"its shape is {tuple(image.shape)}; the inputs before it have {plan.shape}"
                yield index, blank, _fail()

        for gathered in sampler.run(work()):
            error = failed.get(gathered.index)
            yield gathered if error is None else replace(gathered, evidence={}, error=error)

    def _first_plan(self, source: Iterator[Input], failed: dict[int, str]) -> tuple[Plan | None, list[Input]]:
        """Lay the windows out for the first input that they fit into; those before it have failed."""
        for entry in source:
            try:
                return self.plan(entry.image.shape), [entry]
            except RspluginsError as error:
                failed[entry.index] = " ".join(str(error).split())
        return None, []

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the function that is certified, as JSON values."""
        return self._sampler(self.classifier, self.execution).describe()

    def _function(self, plan: Plan, lift: Lift) -> tuple[Reduced, Execution]:
        windows = len(plan.windows.positions)
        size = self.execution.batch_size
        limit = 256 if size == "auto" else size
        soft = self.parameters.noise == "soft"
        function = Reduced(
            self.classifier,
            lift,
            reduce=self.parameters.reduce,
            scores=self.parameters.scores,
            lifted=self._lifted,
            chunk=plan.chunk,
            limit=limit,
            probabilities=soft,
        )
        return function, self.execution if size == "auto" else replace(self.execution, batch_size=max(1, size // windows))

    def _sampler(self, function: nn.Module, execution: Execution) -> Sampler:
        return Sampler(
            function,
            gaussian_noise(self.parameters.sigma, self.execution),
            self.classifier.num_classes,
            execution,
            tally="values" if self.parameters.noise == "soft" else "votes",
            device=self.classifier.device,
            dtype=self._dtype(),
        )

    def _item(self, lift: Lift, image: torch.Tensor) -> torch.Tensor:
        if not self._lifted:
            return image
        with torch.inference_mode():
            windows: torch.Tensor = lift(image[None].to(self._dtype()))[0]
        return windows

    def _check_windows(self, plan: Plan, lift: Lift, first: Input) -> None:
        # The claims rest on each window being scored by itself, so its company may not matter: neither other images' windows nor
        # those of its own image, which the sampler cannot tell from the image.
        with torch.inference_mode():
            window = lift.one(first.image[None].to(self._dtype()), 0)[0]
        if plan.chunk is not None:
            window = window[:, : plan.chunk]
        size = self.execution.batch_size
        if self.parameters.noise == "soft" or self.parameters.scores == "probabilities":
            doubts.about_scores(self.classifier.trial_copy(), window[None], "smooth-reduce")
        rows = _ROWS if size == "auto" else min(size, _ROWS)
        check_independent(self.classifier, first.index, window, self.execution, sigma=self.parameters.sigma, rows=rows)

    def _dtype(self) -> torch.dtype:
        # A half-precision classifier rounds after the noise: an image rounded before it would be another image.
        return torch.promote_types(self.classifier.dtype, torch.float32)

    def _program(self, plan: Plan) -> Program:
        n0, n = self.parameters.n0, self.parameters.n
        soft = self.parameters.noise == "soft"
        selection = yield Draw(0, n0)
        chosen: Any = selection.scores() if soft else selection.votes()
        estimation = yield Draw(n0, n0 + n)
        found: Any = estimation.scores() if soft else estimation.votes()
        evidence: dict[str, Any] = {"selection": chosen, "estimation": found, "geometry": plan.geometry()}
        evidence |= grid_evidence(self.execution, math.prod(plan.shape))
        if soft:
            evidence["classes"] = self.classifier.num_classes
        return evidence

    def _bound(self) -> Literal["clopper-pearson", "empirical-bernstein", "hoeffding"]:
        return self.parameters.bound if self.parameters.noise == "soft" else "clopper-pearson"

    def _alpha(self) -> float:
        every_class = self.parameters.noise == "soft" and claims.runner_up(self._values) == "bounded"
        return bonferroni(self.parameters.alpha, classes=(self.classifier.num_classes or 1) if every_class else 1)


def _fail() -> Program:
    return {}
    yield Draw(0, 0)  # a generator that asks for nothing
