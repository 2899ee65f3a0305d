r"""Confidence sequences: bounds of a probability that hold at every look at once, so that sampling may stop at any time.

Why it is valid. For a candidate q, let somebody bet that the true probability p is above q: from capital 1, each vote
multiplies the capital by :math:`1 - c + c/q` if it is a success and by :math:`1 - c` if not. If :math:`p \le q` the expected
factor is :math:`1 - c + c\,p/q \le 1`, so the capital is a non-negative supermartingale, and so is its average over c uniform
in (0, 1),

.. math:: M_t(q) = \int_0^1 \left(1 - c + \tfrac cq\right)^{k} (1 - c)^{t-k}\, dc
                 = \frac{B(k+1,\, t-k+1)\; \bar I_q(k+1,\, t-k+1)}{(1-q)\; q^{k}\, (1-q)^{t-k}}

(substitute :math:`u = q + c (1 - q)`: the mixture is a uniform prior on alternatives u in (q, 1)). By Ville's inequality
:math:`P(\exists t: M_t(q) \ge 1/\alpha) \le \alpha` for :math:`q \ge p`. The lower bound :math:`L_t` is the largest q with
:math:`M_t(q) \ge 1/\alpha`; M falls in q, so :math:`L_t > p` at any t implies :math:`M_t(p) \ge 1/\alpha`: with probability 1 -
alpha that happens at no t, whatever rule stops the sampling.

Sources: Ville, "Etude critique de la notion de collectif" (1939); Robbins, "Statistical methods related to the law of the
iterated logarithm", Ann. Math. Stat. 41 (1970); Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", Ann. Stat. 49 (2021), the beta-binomial mixture; the one-sided form with the truncated uniform mixture is
derived above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import betaincc, betaln

from rsplugins.errors import ParameterError
from rsplugins.statistics._checks import check_alpha, check_counts, check_trials
from rsplugins.statistics.bounds import Bound
from rsplugins.statistics.radii import radius_from_one_bound

Decision = Literal["at-least", "not"]

FUTILITY = 0.01
"""The chance of still reaching a radius by the last sample below which an input is given up. It is no part of a certificate's
alpha: "not" claims nothing, it only ends the sampling of an input early, and the radius then read from the lower sequence is
valid at any stopping time. A wrong "not" costs radius, never soundness."""

_STEPS = 60


def sequence_lower(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> Bound:
    """Lower confidence sequence of a probability: with probability 1 - alpha it is at most the true value at *every* look.

    One-sided; the formula, its proof and its sources are at the head of this module.

    Args:
        successes: k, integers in 0..t, any shape.
        trials: t, integers >= 1, as many as have been seen at this look; broadcast against ``successes``.
        alpha: probability that the bound is above the true value at any look, in (0, 1).

    Returns:
        The bound, in [0, 1); exactly 0 for k = 0.

    Raises:
        ParameterError: for impossible counts or alpha outside (0, 1).

    Example:
        >>> round(float(sequence_lower(1_000, 1_000, 0.001)), 4)  # Clopper-Pearson, valid at one look only, gives 0.9931
        0.9909
    """
    alpha = check_alpha(alpha)
    if type(successes) is int and type(trials) is int and 0 <= successes <= trials > 0:  # as a run of claims has them
        return _lower_scalar(successes, trials, alpha)
    k, t = check_counts(successes, trials)
    if k.ndim == 0 and t.ndim == 0:
        return _lower_scalar(float(k), float(t), alpha)
    k, t = np.broadcast_arrays(k, t)
    bound: npt.NDArray[np.float64] = _lower(k, t, alpha)
    return bound


def sequence_upper(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> Bound:
    """Upper confidence sequence of a probability: with probability 1 - alpha it is at least the true value at *every* look.

    One-sided: 1 minus the lower sequence of the failures. Arguments and errors as :func:`sequence_lower`.

    Example:
        >>> round(float(sequence_upper(0, 1_000, 0.001)), 4)
        0.0091
    """
    k, t = check_counts(successes, trials)
    return 1.0 - sequence_lower(t - k, t, alpha)


def looks(n: int, *, first: int = 32, growth: float = 1.25) -> tuple[int, ...]:
    """The numbers of samples after which a stopping rule looks: geometric, ending at n, the same whatever the batch size.

    About 3 ln(n/first)/ln(growth^3) looks; stopping waits at most a factor ``growth`` longer than a look after every sample
    would.

    Args:
        n: the most samples an input may get, >= 1.
        first: the first look, >= 1; no radius can be decided with much less.
        growth: the ratio between looks, > 1.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> looks(200)
        (32, 40, 50, 63, 79, 99, 124, 155, 194, 200)
    """
    check_trials(n)
    check_trials(first, name="first")
    if not growth > 1:
        raise ParameterError(f"growth = {growth!r} must be greater than 1.", fix="Use growth=1.25.")
    schedule, at = [], first
    while at < n:
        schedule.append(at)
        at = math.ceil(at * growth)
    return (*schedule, n)


def decide(
    successes: int,
    trials: int,
    radius: float,
    *,
    sigma: float,
    alpha: float,
    n: int,
    divide_by: float = 1.0,
    futility: float = FUTILITY,
) -> Decision | None:
    """Whether the votes so far decide "certified at least at this radius".

    ``"at-least"``: the radius that the lower sequence gives now reaches ``radius``, so the claim made at this look reaches it
    too. ``"not"``: given the votes so far the chance of reaching it by sample n is below ``futility`` (see :data:`FUTILITY` for
    why that spends no alpha), or 0 as even unanimous votes could not. Both are functions of the counts alone, never of the batch
    size.

    The chance is predictive (stochastic curtailment: Lan, Simon, Halperin, Sequential Analysis 1, 1982): the votes still to come
    follow a beta-binomial law under the prior 1 / (1 - p), which gives up no unanimous input. Without it, an input whose share
    lies a little above what the radius needs, but by less than n samples can show, takes all n of them to learn nothing.

    Args:
        successes: votes for the class so far, 0..trials.
        trials: samples so far, 1..n.
        radius: the radius in question, >= 0; 0 asks whether anything is certified.
        sigma: standard deviation of the noise, > 0.
        alpha: the certificate's alpha, in (0, 1).
        n: the most samples this input may get.
        divide_by: as in :func:`rsplugins.statistics.radii.radius_from_one_bound`.
        futility: give up below this chance, in [0, 1); 0 never gives up while the radius can be reached.

    Returns:
        The decision, or None when more samples are needed.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> decide(100, 100, 0.25, sigma=0.25, alpha=0.001, n=10_000)
        'at-least'
        >>> decide(50, 100, 0.25, sigma=0.25, alpha=0.001, n=10_000)
        'not'
        >>> decide(85, 100, 0.25, sigma=0.25, alpha=0.001, n=10_000) is None
        True
    """
    if not radius >= 0 or not trials <= n:
        raise ParameterError(
            f"Cannot decide radius {radius!r} after {trials!r} of {n!r} samples.", fix="Use a radius >= 0 and at most n samples."
        )

    if _reaches(successes, trials, radius, sigma, alpha, divide_by):
        return "at-least"
    needed = _votes_needed(n, radius, sigma, alpha, divide_by) - successes
    left = n - trials
    if needed > left or _chance_of_votes(needed, left, successes, trials) < futility:
        return "not"
    return None


def decide_all(successes: int, trials: int, radii: Iterable[float], **options: Any) -> bool:
    """Whether every radius of ``radii`` is decided, so that sampling of this input may stop; options as :func:`decide`.

    Example:
        >>> decide_all(100, 100, [0.1, 0.25], sigma=0.25, alpha=0.001, n=10_000)
        True
    """
    return all(decide(successes, trials, radius, **options) is not None for radius in radii)


def _reaches(successes: int, trials: int, radius: float, sigma: float, alpha: float, divide_by: float) -> bool:
    found = radius_from_one_bound(float(sequence_lower(successes, trials, alpha)), sigma, divide_by=divide_by)
    return found > 0 and found >= radius


@lru_cache(maxsize=4096)
def _votes_needed(n: int, radius: float, sigma: float, alpha: float, divide_by: float) -> int:
    """Return the fewest of n votes that certify the radius, n + 1 when none do, by bisection: the bound grows with the votes."""
    low, high = -1, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _reaches(middle, n, radius, sigma, alpha, divide_by):
            high = middle
        else:
            low = middle
    return high


def _chance_of_votes(needed: int, left: int, successes: int, trials: int) -> float:
    """Return about the chance of ``needed`` successes among ``left`` more votes: a beta tail for the beta-binomial one."""
    if needed <= 0:
        return 1.0
    if successes == trials:
        return 1.0
    mean = (successes + 1) / (trials + 1)  # the prior 1 / (1 - p): a beta law of successes + 1 and failures
    concentration = left * (trials + 2) / (trials + 1 + left) - 1.0  # its variance is that of the beta-binomial law
    if not concentration > 0.0:  # one vote is left
        return mean
    return float(betaincc(mean * concentration, (1.0 - mean) * concentration, (needed - 0.5) / left))


@lru_cache(maxsize=65536)
def _lower_scalar(k: float, t: float, alpha: float) -> float:
    return float(_lower(float(k), float(t), alpha))


def _lower(k: Any, t: Any, alpha: float) -> Any:
    """Solve log M(q) = log(1/alpha) by Newton's method in x = log q.

    log M is convex and falls in x (each log(1 - c + c e^-x) is and does), so a Newton step from anywhere lands where M is at
    least 1/alpha: each iterate is itself a valid lower bound, and stopping early only loses tightness.
    """
    # More than the rounding of the log-beta function and the powers, which grows with t.
    target = math.log(1 / alpha) + 1e-9 + 1e-13 * t
    some = np.maximum(k, 1.0)
    spread = np.sqrt(some * (t - some) / t + 1.0)
    x = np.log(np.maximum(some - (math.sqrt(2 * math.log(1 / alpha)) + 1) * spread, 0.1 * some) / t)
    for _ in range(_STEPS):
        value, slope = _log_capital(some, t, x)
        step = (value - target) / slope
        x = x - step
        if np.all(np.abs(step) <= 1e-12 * np.abs(x)):
            break
    value, _slope = _log_capital(some, t, x)
    # A last step that rounding pushed too far must not become a bound; half of the slack above is left for this evaluation.
    return np.where((k >= 1) & (value >= target - 5e-10 - 5e-14 * t), np.exp(x), 0.0)


def _log_capital(k: Any, t: Any, x: Any) -> tuple[Any, Any]:
    """Return log M(q) and its derivative in x = log q."""
    f, q, rest = t - k, np.exp(x), -np.expm1(x)
    value = betaln(k + 1, f + 1) + np.log(betaincc(k + 1, f + 1, q)) - k * x - (f + 1) * np.log(rest)
    slope = (f + 1 - np.exp(-value)) * q / rest - k
    return value, slope
