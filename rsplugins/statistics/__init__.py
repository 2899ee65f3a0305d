"""Confidence bounds, confidence sequences, radii and sample budgets: numpy and scipy only, no torch.

For plugin authors: pick a bound by what was sampled (votes or scores, fixed or stopped early), turn it into a radius, and write
the claim as a pure function like those of :mod:`rsplugins.statistics.claims`.
"""

from rsplugins.statistics.bounds import (
    betting_lower,
    betting_upper,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
)
from rsplugins.statistics.budgets import bonferroni, check_budget, largest_radius, smallest_n
from rsplugins.statistics.claims import vote_radius, votes_claim
from rsplugins.statistics.radii import radius_from_one_bound, radius_from_two_bounds, round_down
from rsplugins.statistics.sequences import decide, decide_all, looks, sequence_lower, sequence_upper

__all__ = [
    "betting_lower",
    "betting_upper",
    "bonferroni",
    "check_budget",
    "clopper_pearson_interval",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "decide",
    "decide_all",
    "empirical_bernstein_lower",
    "empirical_bernstein_upper",
    "hoeffding_lower",
    "hoeffding_upper",
    "largest_radius",
    "looks",
    "radius_from_one_bound",
    "radius_from_two_bounds",
    "round_down",
    "sequence_lower",
    "sequence_upper",
    "smallest_n",
    "vote_radius",
    "votes_claim",
]
