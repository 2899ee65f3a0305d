r"""From confidence bounds of class probabilities under Gaussian noise to certified l2 radii, rounded down.

A radius is certified only if it is not larger than the true value of its formula. Three errors stand between the two. The
bound's own rounding (scipy's inverse beta function lands within 5e-15 of the true value, on either side) is met by moving the
bound 2e-14 the safe way; that also covers the inverse normal cdf where two quantiles cancel, because its slope is never below
2.5. What follows (scaling, and bounds that were computed with less care) is met by a relative 1e-9 off the radius, a thousand
times the error measured. The rounding of printed digits is met by :func:`round_down`.
"""

from __future__ import annotations

from scipy.special import ndtri

from rsplugins.errors import ParameterError
from rsplugins.rounding import round_down as round_down
from rsplugins.statistics._checks import check_positive

BOUND_SLACK = 2e-14
RADIUS_SLACK = 1e-9


def radius_from_one_bound(p_lower: float, sigma: float, *, divide_by: float = 1.0) -> float:
    r"""The l2 radius from a lower bound of the top class alone, every other class being at most the rest.

    .. math:: R = \sigma\, \Phi^{-1}(\underline{p_A}) \text{ if } \underline{p_A} > 1/2, \text{ else } 0

    Source: Cohen, Rosenfeld, Kolter (ICML 2019), theorem 1 with :math:`\overline{p_B} = 1 - \underline{p_A}`, for votes; Salman
    et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers" (NeurIPS 2019), appendix A (lemma 2),
    for scores that sum to at most 1 over the classes.

    Args:
        p_lower: lower bound of the top class, in [0, 1].
        sigma: standard deviation of the noise, > 0, on raw [0, 1] pixels.
        divide_by: the (upper bound of the) operator norm of whatever lies between the image and the noise, > 0.

    Returns:
        The radius, >= 0 and finite, rounded down. 0.0 means: nothing can be claimed, abstain.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> radius_from_one_bound(0.9, sigma=0.5) <= 0.5 * 1.2815515655446004
        True
        >>> radius_from_one_bound(0.5, sigma=0.5)
        0.0
    """
    _check_probability(p_lower, "p_lower")
    p = p_lower - BOUND_SLACK
    if p <= 0.5:
        check_positive(sigma, "sigma")
        return 0.0
    return _scaled(float(ndtri(p)), sigma, divide_by)


def radius_from_two_bounds(p_lower: float, runner_up_upper: float, sigma: float, *, divide_by: float = 1.0) -> float:
    r"""The l2 radius from a lower bound of the top class and one upper bound that holds for every other class.

    .. math:: R = \frac{\sigma}{2} \left(\Phi^{-1}(\underline{p_A}) - \Phi^{-1}(\overline{p_B})\right)
        \text{ if } \underline{p_A} > \overline{p_B}, \text{ else } 0

    Needs no ``p_lower > 1/2``, and is valid for scores that do not sum to 1. Source: Cohen et al. (ICML 2019), theorem 1,
    equation (3). The alpha of all the bounds involved adds up; see :func:`rsplugins.statistics.budgets.bonferroni`.

    Args:
        p_lower: lower bound of the top class, in [0, 1].
        runner_up_upper: the largest upper bound among all other classes, in [0, 1].
        sigma: standard deviation of the noise, > 0.
        divide_by: as in :func:`radius_from_one_bound`.

    Returns:
        The radius, >= 0 and finite, rounded down.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> round(radius_from_two_bounds(0.4, 0.1, sigma=1.0), 6)
        0.514102
    """
    _check_probability(p_lower, "p_lower")
    _check_probability(runner_up_upper, "runner_up_upper")
    top, other = p_lower - BOUND_SLACK, runner_up_upper + BOUND_SLACK
    if top <= other or top <= 0.0:
        check_positive(sigma, "sigma")
        return 0.0
    return _scaled(float(ndtri(top) - ndtri(min(other, 1.0))) / 2, sigma, divide_by)


def _scaled(quantile: float, sigma: float, divide_by: float) -> float:
    radius = check_positive(sigma, "sigma") * quantile / check_positive(divide_by, "divide_by")
    return max(0.0, radius * (1 - RADIUS_SLACK))


def _check_probability(value: float, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ParameterError(f"{name} = {value!r} is not a probability.", fix="Pass a number in [0, 1].")
