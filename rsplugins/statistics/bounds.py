r"""Confidence bounds at a number of samples that was fixed before sampling.

Each ``*_lower`` is at most the true value, and each ``*_upper`` at least, with probability 1 - alpha: one side each. Taking both
sides costs both alphas, as :func:`clopper_pearson_interval` shows.

For votes (0 or 1) use Clopper-Pearson: it is exact. For scores in [0, 1] Clopper-Pearson is *not* valid; use empirical Bernstein
(best when scores vary little), Hoeffding (best at small n), or the betting bound (usually the tightest; it needs the scores
themselves or their histogram). Choose before looking: the best of two bounds costs alpha/2 each.

None of these may be looked at repeatedly while samples come in; see :mod:`rsplugins.statistics.sequences` for that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from rsplugins.errors import ParameterError
from rsplugins.statistics._checks import check_alpha, check_counts, check_trials

Bound = float | npt.NDArray[np.float64]
"""A float for scalar arguments, otherwise a float64 array of the broadcast shape; always in [0, 1]."""

SUM_SLACK = 2.0**-50
"""Relative error allowed for each of the n additions in a float64 sum: eight units in the last place, where one is the proven
limit."""

STAKES: npt.NDArray[np.float64] = 0.5 ** np.arange(12, dtype=np.float64)
"""The grid c = 1, 1/2, ..., 2^-11 of the betting bound: factor 2 apart costs at most a tenth of the growth of the best stake."""


def clopper_pearson_lower(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> Bound:
    r"""Exact one-sided lower bound of a probability, from votes.

    .. math:: L = \mathrm{Beta}^{-1}(\alpha;\; k,\; n - k + 1), \qquad P(L > p) \le \alpha

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26
    (1934); used for smoothing by Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing" (ICML
    2019), section 3.2.2 (LowerConfBound).

    Args:
        successes: k, integers in 0..n, any shape.
        trials: n, integers >= 1, fixed before sampling; broadcast against ``successes``.
        alpha: probability that the bound is above the true value, in (0, 1).

    Returns:
        The bound; exactly 0 for k = 0 and alpha^(1/n) for k = n.

    Raises:
        ParameterError: for impossible counts or alpha outside (0, 1).

    Example:
        >>> round(float(clopper_pearson_lower(9_990, 10_000, 0.001)), 6)
        0.997588
        >>> clopper_pearson_lower([0, 50, 100], 100, 0.001).round(4).tolist()
        [0.0, 0.3448, 0.9333]
    """
    alpha = check_alpha(alpha)
    if type(successes) is int and type(trials) is int and 0 < successes < trials:  # arrays of one cost ten times as much
        return float(betaincinv(successes, trials - successes + 1, alpha))
    k, n = check_counts(successes, trials)
    inside = betaincinv(np.maximum(k, 1), n - k + 1, alpha)
    bound = np.where(k == 0, 0.0, np.where(k == n, np.exp(math.log(alpha) / n), inside))
    return _plain(bound)


def clopper_pearson_upper(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> Bound:
    """Exact one-sided upper bound of a probability: 1 minus the lower bound of the failures.

    Source, arguments and errors as :func:`clopper_pearson_lower`.

    Example:
        >>> round(float(clopper_pearson_upper(0, 100, 0.001)), 4)
        0.0667
    """
    k, n = check_counts(successes, trials)
    return _plain(1.0 - np.asarray(clopper_pearson_lower(n - k, n, alpha)))


def clopper_pearson_interval(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> tuple[Bound, Bound]:
    """Two-sided interval: a lower and an upper bound at alpha/2 each, so that both hold with probability 1 - alpha.

    Source, arguments and errors as :func:`clopper_pearson_lower`.

    Example:
        >>> [round(float(side), 4) for side in clopper_pearson_interval(50, 100, 0.05)]
        [0.3983, 0.6017]
    """
    half = check_alpha(alpha) / 2
    return clopper_pearson_lower(successes, trials, half), clopper_pearson_upper(successes, trials, half)


def hoeffding_lower(total: float, trials: int, alpha: float) -> float:
    r"""One-sided lower bound of the mean of scores in [0, 1], from their sum.

    .. math:: L = \bar x - \sqrt{\ln(1/\alpha) / (2n)}, \qquad P(L > \mu) \le \alpha

    Source: Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 58 (1963), theorem 1, (2.3).

    Args:
        total: float64 sum of the n scores, in [0, n]; the rounding of the summation is allowed for.
        trials: n >= 1, fixed before sampling.
        alpha: probability that the bound is above the true mean, in (0, 1).

    Raises:
        ParameterError: when the arguments are out of range.

    Example:
        >>> round(hoeffding_lower(100_000.0, 100_000, 0.001), 6)
        0.994123
    """
    alpha, trials = check_alpha(alpha), check_trials(trials)
    _check_sums(total, total, trials)
    mean = total / trials * (1 - trials * SUM_SLACK)
    return _clip(mean - math.sqrt(math.log(1 / alpha) / (2 * trials)))


def hoeffding_upper(total: float, trials: int, alpha: float) -> float:
    """One-sided upper bound of the mean of scores in [0, 1]: 1 minus the lower bound of 1 - score.

    Source, arguments and errors as :func:`hoeffding_lower`.

    Example:
        >>> round(hoeffding_upper(0.0, 100_000, 0.001), 6)
        0.005877
    """
    alpha, trials = check_alpha(alpha), check_trials(trials)
    _check_sums(total, total, trials)
    mean = total / trials * (1 + trials * SUM_SLACK)
    return _clip(mean + math.sqrt(math.log(1 / alpha) / (2 * trials)))


def empirical_bernstein_lower(total: float, squares: float, trials: int, alpha: float) -> float:
    r"""One-sided lower bound of the mean of scores in [0, 1], from their sum and sum of squares; tight when they vary little.

    .. math:: L = \bar x - \sqrt{2 v \ln(2/\alpha) / n} - \frac{7 \ln(2/\alpha)}{3 (n - 1)}, \qquad P(L > \mu) \le \alpha

    with the unbiased sample variance :math:`v`. Source: Maurer and Pontil, "Empirical Bernstein Bounds and Sample Variance
    Penalization" (COLT 2009), theorem 4. (The 2/alpha already pays for estimating the variance; the bound is one-sided.)

    Args:
        total: float64 sum of the n scores, in [0, n].
        squares: float64 sum of their squares, in [total^2/n, total]; the rounding of both sums is allowed for.
        trials: n >= 2, fixed before sampling.
        alpha: probability that the bound is above the true mean, in (0, 1).

    Raises:
        ParameterError: when the arguments are out of range.

    Example:
        >>> round(empirical_bernstein_lower(100_000.0, 100_000.0, 100_000, 0.001), 6)
        0.999822
    """
    mean, width = _bernstein(total, squares, trials, alpha)
    return _clip(mean * (1 - trials * SUM_SLACK) - width)


def empirical_bernstein_upper(total: float, squares: float, trials: int, alpha: float) -> float:
    """One-sided upper bound of the mean of scores in [0, 1].

    Source, arguments and errors as :func:`empirical_bernstein_lower`, applied to 1 - score, whose variance is the same.

    Example:
        >>> round(empirical_bernstein_upper(0.0, 0.0, 100_000, 0.001), 6)
        0.000178
    """
    mean, width = _bernstein(total, squares, trials, alpha)
    return _clip(mean * (1 + trials * SUM_SLACK) + width)


def betting_lower(values: npt.ArrayLike, alpha: float, counts: npt.ArrayLike | None = None) -> float:
    r"""One-sided lower bound of the mean of scores in [0, 1], from the scores or from their histogram.

    Somebody who believes the mean is above m bets a fixed share on each score. With stakes :math:`\lambda = c/m` the capital

    .. math:: K_m = \frac1{|C|} \sum_{c \in C} \prod_i \left(1 + \tfrac{c}{m} (x_i - m)\right), \qquad 0 < c \le 1

    has expectation at most 1 when the mean is at most m, so :math:`P(K_m \ge 1/\alpha) \le \alpha` (Markov); the bound is the
    largest m with that much capital. Each factor is :math:`1 - c + c\,x_i/m`: falling in m, so the rejected m form an interval,
    and growing in x, so scores *rounded down* (a histogram of quantised scores) keep the bound valid. The order of the scores
    plays no part. Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B (2024),
    proposition 2 and theorem 3, with a finite mixture of constant bets instead of predictable ones.

    Args:
        values: scores in [0, 1], shape (n,), or the lower edges of the histogram's bins, shape (bins,).
        alpha: probability that the bound is above the true mean, in (0, 1).
        counts: how often each value occurred, integers >= 0, shape as ``values``; None for once each. Their sum n is fixed
            before sampling.

    Raises:
        ParameterError: for values outside [0, 1], counts that do not fit, or no scores at all.

    Example:
        >>> round(betting_lower([0.8, 0.9, 1.0], 0.001, counts=[10, 980, 10]), 4)
        0.8915
    """
    alpha = check_alpha(alpha)
    x, weight = _check_histogram(values, counts)
    target = math.log(1 / alpha) + 1e-9  # more than the rounding of the logarithms below
    low, high = 0.0, float(x @ weight / weight.sum())  # at the sample mean the capital is at most 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle > 0 and _log_capital(x, weight, middle) >= target else (low, middle)
    return _clip(low)


def betting_upper(values: npt.ArrayLike, alpha: float, counts: npt.ArrayLike | None = None) -> float:
    """One-sided upper bound of the mean of scores in [0, 1]: 1 minus the lower bound of 1 - score.

    Source, arguments and errors as :func:`betting_lower`; a histogram's values are here the *upper* edges of its bins.

    Example:
        >>> round(betting_upper([0.0, 0.1, 0.2], 0.001, counts=[10, 980, 10]), 4)
        0.1085
    """
    return _clip(1.0 - betting_lower(1.0 - np.asarray(values, dtype=np.float64), alpha, counts))


def _log_capital(x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], mean: float) -> float:
    with np.errstate(divide="ignore"):  # a bet of everything on a score of 0 ends with log 0 = -inf
        growth = np.log(1.0 - STAKES[:, None] + STAKES[:, None] * (x / mean)) @ weight
    return float(np.logaddexp.reduce(growth) - math.log(len(STAKES)))


def _bernstein(total: float, squares: float, trials: int, alpha: float) -> tuple[float, float]:
    alpha, trials = check_alpha(alpha), check_trials(trials, at_least=2)
    _check_sums(total, squares, trials)
    mean = total / trials
    # The difference cancels, so the rounding of both sums (each at most n * slack * n) is added rather than scaled.
    variance = max(0.0, squares - total * mean) / (trials - 1) + 4 * trials * SUM_SLACK
    logs = math.log(2 / alpha)
    return mean, math.sqrt(2 * variance * logs / trials) + 7 * logs / (3 * (trials - 1))


def _check_sums(total: float, squares: float, trials: int) -> None:
    slack = 4 * trials * trials * SUM_SLACK
    if not (-slack <= squares <= total + slack and total <= trials + slack and squares >= total * total / trials - slack):
        raise ParameterError(
            f"A sum of {total!r} and a sum of squares of {squares!r} cannot come from {trials} scores in [0, 1].",
            cause="Logits were summed instead of probabilities, or the sums and n belong to different inputs.",
            fix="Pass sums of scores in [0, 1] accumulated in float64.",
        )


def _check_histogram(values: npt.ArrayLike, counts: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(x) if counts is None else np.asarray(counts, dtype=np.float64)
    good = x.ndim == 1 and weight.shape == x.shape and np.all((x >= 0) & (x <= 1))
    if not (good and np.all((weight >= 0) & (weight == np.floor(weight))) and weight.sum() > 0):
        raise ParameterError(
            "The betting bound needs a flat list of scores in [0, 1], and one count per score when counts are given.",
            cause="A score is outside [0, 1], a count is negative or fractional, the lengths differ, or there are no scores.",
            fix="Pass probabilities, not logits; counts are how often each score occurred.",
        )
    used = weight > 0  # 0 * log(0) would be nan
    return x[used], weight[used]


def _clip(value: float) -> float:
    return float(min(1.0, max(0.0, value)))


def _plain(bound: npt.NDArray[np.float64]) -> Bound:
    return float(bound) if bound.ndim == 0 else bound
