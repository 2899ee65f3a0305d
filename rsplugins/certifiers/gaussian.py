"""Gaussian randomised smoothing: the certifiers ``gaussian`` (votes) and ``gaussian-soft`` (class probabilities)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from rsplugins import doubts
from rsplugins.certificate import Gathered
from rsplugins.certifier import LARGEST_SIGMA, Certifier, CertifierParameters, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.sampling import Draw, Program, Sampler, gaussian_noise, grid_evidence
from rsplugins.statistics import bonferroni, check_budget, decide_all, looks

_KEPT_CLASSES = 5


class _Smoothing(CertifierParameters):
    sigma: float = Field(0.25, gt=0, le=LARGEST_SIGMA, description="standard deviation of the noise, on raw [0, 1] pixels")
    n0: int = Field(100, ge=1, description="selection samples, which choose the class and are then set aside")
    n: int = Field(10_000, ge=1, description="estimation samples; the most there may be when stop_at is given")
    alpha: float = Field(0.001, gt=0, lt=1, description="probability of a false certificate, for one input")


class GaussianParameters(_Smoothing):
    """What the user may set of ``gaussian``."""

    stop_at: tuple[float, ...] = Field((), description='radii: sampling of an input ends once "at least r" is decided for each')

    @field_validator("stop_at")
    @classmethod
    def _not_negative(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if any(radius < 0 for radius in radii):
            raise ValueError("every radius must be at least 0")
        return radii


class GaussianSoftParameters(_Smoothing):
    """What the user may set of ``gaussian-soft``; see :func:`rsplugins.statistics.claims.gaussian_soft`."""

    bound: Literal["empirical-bernstein", "hoeffding"] = Field("empirical-bernstein", description="bound of the mean score")
    runner_up: Literal["complement", "bounded"] = Field("complement", description="how the other classes are bounded")


class Gaussian(Certifier[GaussianParameters]):
    """Certified l2 radii from majority votes under Gaussian noise.

    Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing" (ICML 2019), theorem 1 and CERTIFY:
    the class is chosen by ``n0`` samples and its probability bounded by ``n`` fresh ones.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`GaussianParameters`.
        execution: how to run the model.

    Raises:
        ImpossibleBudgetError: when ``n`` samples cannot certify anything, naming the smallest n that could.
    """

    Parameters = GaussianParameters
    samples_soundly = True

    def __init__(self, classifier: Classifier, parameters: GaussianParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        p = parameters
        # With one of the radii out of reach of unanimous votes, sampling would end at once with "not".
        check_budget(
            p.n,
            sigma=p.sigma,
            alpha=p.alpha,
            bound="sequence" if p.stop_at else "clopper-pearson",
            radius=max(p.stop_at, default=0.0) or None,
        )
        self.sampler = Sampler(classifier, gaussian_noise(p.sigma, execution), classifier.num_classes, execution)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield vote counts, ``{"selection": {"3": 97, "5": 3}, "estimation": {"3": 9990, "5": 10}}``."""
        return self.sampler.run((index, image, self._program(image.numel())) for index, image in inputs)

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the function that is certified, as JSON values."""
        return self.sampler.describe()

    def _program(self, elements: int) -> Program:
        p = self.parameters
        selection = yield Draw(0, p.n0)
        chosen = int(selection.counts.argmax())
        counts, seen = np.zeros_like(selection.counts), 0
        for look in looks(p.n) if p.stop_at else (p.n,):
            tally = yield Draw(p.n0 + seen, p.n0 + look)
            counts, seen = counts + tally.counts, look
            votes = int(counts[chosen])
            if p.stop_at and decide_all(votes, seen, p.stop_at, sigma=p.sigma, alpha=p.alpha, n=p.n):
                break
        estimation = {str(label): int(counts[label]) for label in np.flatnonzero(counts)}
        return {"selection": selection.votes(), "estimation": estimation, **grid_evidence(self.execution, elements)}


class GaussianSoft(Certifier[GaussianSoftParameters]):
    """Certified l2 radii from mean class probabilities under Gaussian noise.

    Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers" (NeurIPS 2019), lemma 2. The
    classifier that is certified returns the class of the largest mean softmax probability.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`GaussianSoftParameters`.
        execution: how to run the model.

    Raises:
        ImpossibleBudgetError: when ``n`` samples cannot certify anything, naming the smallest n that could.
    """

    Parameters = GaussianSoftParameters
    samples_soundly = True

    def __init__(self, classifier: Classifier, parameters: GaussianSoftParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        p = parameters
        classes = classifier.num_classes if p.runner_up == "bounded" else 1
        check_budget(p.n, sigma=p.sigma, alpha=bonferroni(p.alpha, classes=classes or 1), bound=p.bound)
        self._doubted = False
        noise = gaussian_noise(p.sigma, execution)
        self.sampler = Sampler(classifier, noise, classifier.num_classes, execution, tally="scores")

    def check_images(self, images: Tensor) -> None:
        """Check the images, and say where the model's last layer is a softmax, which would be taken twice."""
        super().check_images(images)
        if len(images) and not self._doubted:
            doubts.about_scores(self.classifier.trial_copy(), images[:1].to(self.classifier.device), "gaussian-soft")
            self._doubted = True

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield score sums, in the form that :func:`rsplugins.statistics.claims.gaussian_soft` documents."""
        return self.sampler.run((index, image, self._program(image.numel())) for index, image in inputs)

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the function that is certified, as JSON values."""
        return self.sampler.describe()

    def _program(self, elements: int) -> Program:
        p = self.parameters
        selection = yield Draw(0, p.n0)
        estimation = yield Draw(p.n0, p.n0 + p.n)
        classes = len(selection.sums)
        # The complement rule needs the chosen class alone: a record of 1,000 classes would be 60 kB.
        best = classes if p.runner_up == "bounded" else min(classes, _KEPT_CLASSES)
        kept = sorted(np.argsort(-selection.sums, kind="stable")[:best].tolist())

        def table(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
            return {str(label): float(values[label]) for label in kept}

        return {
            "classes": classes,
            "selection": {"n": selection.total, "sums": table(selection.sums)},
            "estimation": {"n": estimation.total, "sums": table(estimation.sums), "squares": table(estimation.squares)},
            **grid_evidence(self.execution, elements),
        }
