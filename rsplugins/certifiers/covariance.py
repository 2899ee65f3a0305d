"""The certifier ``covariance``: radii estimated by propagating a Gaussian. ESTIMATE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.moments.estimator import Estimator, MomentParameters
from rsplugins.moments.plugins import plugin_rules


class CovarianceParameters(MomentParameters):
    """What the user may set of ``covariance``."""

    rule: Literal["union", "sampled", "pairwise", "as-published"] = Field(
        "union", description="how the logit Gaussian is read; see rsplugins.moments.claims.estimated_radius"
    )


class Covariance(Certifier[CovarianceParameters]):
    """What the radius of smoothing would be, from one pass and without a sample.

    Zhen, Chakraborty, Singh, "Simpler Certified Radius Maximization by Propagating Covariances" (CVPR 2021), with the moments put
    right; ``representation="published", rule="as-published"`` is the released code. Never a certificate: activations are taken
    for jointly Gaussian.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`CovarianceParameters`.
        execution: how to run the model; propagation is in float64 whatever it says.

    Raises:
        ParameterError: a layer without a moment rule, or a representation that does not fit in memory.
        UsageError: batch normalisation or dropout in training mode.
    """

    Parameters = CovarianceParameters

    def __init__(self, classifier: Classifier, parameters: CovarianceParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        self.estimator = Estimator(classifier, parameters, plugin_rules(), "covariance")

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield mean and covariance of the logits; see :mod:`rsplugins.moments.claims`."""
        for found in self.estimator.run(inputs):
            yield Gathered(found.item.index, found.evidence, samples=0, seconds=found.seconds)

    def describe(self) -> dict[str, Any]:
        """Return what, besides the classifier, makes up the estimate, as JSON values."""
        said = {"dtype": "float64", "arithmetic": "float64, full precision", "representation": self.estimator.representation}
        return {**said, "rules": self.estimator.rules}
