"""From votes to an l1 radius. Imports no torch: ``rsplugins verify`` calls it where there is no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsplugins import Claim, Evidence, Guarantee, Norm
from rsplugins.statistics import clopper_pearson_lower


def claim(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """R = 2 lambda (p - 1/2), p a lower bound of the chosen class; rounded down by a relative 1e-9."""
    selection, estimation = evidence["selection"], evidence["estimation"]
    chosen = max(sorted(selection, key=int), key=selection.__getitem__)
    lower = float(clopper_pearson_lower(estimation.get(chosen, 0), sum(estimation.values()), parameters["alpha"]))
    radius = max(0.0, 2 * parameters["lambda_"] * (lower - 0.5 - 1e-14) * (1 - 1e-9))
    return Claim(
        prediction=int(chosen) if radius > 0 else None,
        radius=radius,
        guarantee=Guarantee.PROBABILISTIC,
        norm=Norm.L1,
        alpha=parameters["alpha"],
        rule="lee-2019 uniform noise, clopper-pearson",
        assumptions=("float-idealised",),
    )
