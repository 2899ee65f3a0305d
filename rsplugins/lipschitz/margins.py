"""From logits and Lipschitz bounds to the evidence of a deterministic margin certificate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rsplugins.errors import ParameterError
from rsplugins.lipschitz.analysis import Analysis
from rsplugins.lipschitz.composition import Dense
from rsplugins.lipschitz.norms import UNIT, times, up


class MarginBounds:
    """Lipschitz bounds of the differences of logits of a network.

    Args:
        analysis: of the whole Classifier.

    Attributes:
        constant: bound of the network from raw pixels to logits.

    Raises:
        UnsupportedLayerError: a layer has no bound.
        ParameterError: the bound is zero, infinite or NaN.
    """

    def __init__(self, analysis: Analysis) -> None:
        output = analysis.traced.output
        self.reach = analysis.reach
        self.constant = usable_constant(analysis.constant(output), "of the network")
        value = analysis.values[output]
        self._rows: Tensor | None = None
        if isinstance(value.operator, Dense) and len(analysis.traced.info[output].shape or ()) == 2:
            self._rows = value.operator.matrix
            self._features = analysis.evaluation.constant(value.inputs[0])

    def pairs(self, label: int, classes: int) -> Tensor:
        """Return upper bounds (K,) of the Lipschitz constants of f_label - f_k; 0 for k = label."""
        bounds = torch.full((classes,), times(self.constant, up(math.sqrt(2.0))), dtype=torch.float64)
        if self._rows is not None:
            gaps = torch.linalg.vector_norm(self._rows[label] - self._rows, dim=1) * (1.0 + (self._rows.shape[1] + 8) * 2 * UNIT)
            bounds = torch.minimum(bounds, gaps * self._features * (1.0 + 4 * UNIT))
        bounds[label] = 0.0
        return bounds

    def evidence(self, logits: Tensor, slack: float) -> dict[str, Any]:
        """Return the evidence for one input.

        Args:
            logits: (K,).
            slack: what rounding may have added to a margin, relative to the largest logit.
        """
        logits = logits.detach().cpu().double()
        label = int(logits.argmax())
        bounds = self.pairs(label, len(logits))
        margins = logits[label] - logits - slack * logits.abs().max()
        rivals = torch.arange(len(logits)) != label
        ratios = torch.where(rivals & (bounds > 0), margins / bounds, math.inf)
        # A rival whose difference never changes can be left out, unless it is level already.
        ratios = torch.where(rivals & (bounds == 0) & (margins <= 0), 0.0, ratios)
        nearest = int(ratios.argmin())
        constant = float(bounds[nearest]) if bounds[nearest] > 0 else self.constant
        # A larger constant holds too, and keeps the radius where the constants hold.
        constant = max(constant, up(max(0.0, float(margins[nearest])) / self.reach))
        return {"prediction": label, "rival": nearest, "margin": float(margins[nearest]), "constant": constant}


def usable_constant(constant: float, of: str) -> float:
    """Return a bound as it is.

    Raises:
        ParameterError: it is zero, infinite or NaN.
    """
    if math.isfinite(constant) and constant > 0:
        return constant
    cause = "the weights on the way are all zero." if constant == 0 else "a weight is infinite or NaN, or the product overflows."
    raise ParameterError(
        f"The Lipschitz bound {of} is {constant:g}; no radius follows from it.",
        cause=cause,
        fix="Look for the layer with `rsplugins lipschitz MODEL`, or cut earlier.",
    )
