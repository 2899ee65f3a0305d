"""The certifier ``covariance-guided``: votes whose class and number are fixed beforehand by propagation. PROBABILISTIC."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.moments import claims
from rsplugins.moments.estimator import Estimate, Estimator, MomentParameters
from rsplugins.moments.plugins import plugin_rules
from rsplugins.moments.sample_plan import samples_needed
from rsplugins.sampling import Draw, GaussianNoise, Program, Sampler
from rsplugins.statistics import check_budget


class CovarianceGuidedParameters(MomentParameters):
    """What the user may set of ``covariance-guided``."""

    n: int = Field(100_000, ge=1, description="the most samples an input may take, and what the loss is measured against")
    n_min: int = Field(500, ge=1, description="the least")
    tolerance: float = Field(0.05, gt=0, description="expected loss of radius against n samples, in raw pixels")
    alpha: float = Field(0.001, gt=0, lt=1, description="probability of a false certificate, for one input")

    @model_validator(mode="after")
    def _ordered(self) -> CovarianceGuidedParameters:
        if self.n_min > self.n:
            raise ValueError(f"n_min is {self.n_min}, more than n = {self.n}")
        return self


class CovarianceGuided(Certifier[CovarianceGuidedParameters]):
    """Certified l2 radii from fewer votes: propagation says, before any is drawn, for which class and how many.

    Cohen et al. (ICML 2019), theorem 1, with Clopper-Pearson at a number of samples that does not depend on the samples. There is
    no selection sample, as the class is not chosen by votes. A bad estimate costs radius, never validity.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`CovarianceGuidedParameters`.
        execution: how to run the model.

    Raises:
        ImpossibleBudgetError: when ``n_min`` samples cannot certify anything, naming the smallest number that could.
        ParameterError, UsageError: as for ``covariance``.
    """

    Parameters = CovarianceGuidedParameters

    def __init__(self, classifier: Classifier, parameters: CovarianceGuidedParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        p = parameters
        check_budget(p.n_min, sigma=p.sigma, alpha=p.alpha)
        self.estimator = Estimator(classifier, p, plugin_rules(), "covariance-guided")
        self.sampler = Sampler(classifier, GaussianNoise(p.sigma, execution.seed), classifier.num_classes, execution)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield ``{"class": 3, "n": 8000, "failure": log probability, "estimation": {"3": 7990, "5": 10}}``."""
        spent: deque[float] = deque()

        def work() -> Iterator[tuple[int, Tensor, Program]]:
            for found in self.estimator.run(inputs):
                spent.append(found.seconds)
                yield found.item.index, found.item.image, self._program(found)

        for gathered in self.sampler.run(work()):
            # the engine keeps the order, so the first time that waits is this input's
            yield replace(gathered, seconds=gathered.seconds + spent.popleft())

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the function that is certified, as JSON values."""
        return {**self.sampler.describe(), "rules": self.estimator.rules}

    def _program(self, found: Estimate) -> Program:
        p = self.parameters
        failure = claims.log_failure(found.evidence, "sampled")
        n = samples_needed(failure, sigma=p.sigma, alpha=p.alpha, n=p.n, n_min=p.n_min, tolerance=p.tolerance)
        tally = yield Draw(0, n)
        return {"class": found.evidence["kept"][0], "n": n, "failure": max(failure, -1e12), "estimation": tally.votes()}
