"""How many samples a propagated estimate asks for; no torch."""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtr, ndtri, ndtri_exp

_STEPS = 32


def expected_radius(log_failure: float, n: int, sigma: float, alpha: float) -> float:
    """Return about the radius that n votes give when the class fails with this probability; negative for an abstention.

    Clopper-Pearson at the expected, fractional, number of votes.

    Example:
        >>> round(expected_radius(math.log(0.1), 100_000, 1.0, 0.001), 3)
        1.265
    """
    votes = -math.expm1(min(log_failure, 0.0)) * n
    if votes <= 0:
        return -math.inf
    return float(sigma * ndtri(betaincinv(votes, n - votes + 1, alpha)))


def samples_needed(
    log_failure: float, *, sigma: float, alpha: float, n: int, n_min: int, tolerance: float, doubt: float = 0.25
) -> int:
    """Return the smallest number of samples whose expected radius lies at most ``tolerance`` below that of n samples.

    Args:
        log_failure: logarithm of the estimated probability that the class loses; see
            :func:`rsplugins.moments.claims.log_failure`.
        sigma: raw pixels.
        alpha: of the bound.
        n: the most samples.
        n_min: the least.
        tolerance: raw pixels.
        doubt: how far the estimated radius may be off, in units of sigma: the larger number over this band is returned.

    Example:
        >>> samples_needed(-40.0, sigma=0.25, alpha=0.001, n=100_000, n_min=500, tolerance=0.05)
        45371
        >>> samples_needed(math.log(0.3), sigma=0.25, alpha=0.001, n=100_000, n_min=500, tolerance=0.05)
        500
    """
    z = float(-ndtri_exp(log_failure)) if log_failure < 0 else -math.inf
    guesses = [log_failure]
    if abs(z) < 30:
        guesses += [math.log(max(float(ndtr(-(z + shift))), 1e-300)) for shift in (-doubt, doubt)]
    return max(_smallest(guess, sigma, alpha, n, n_min, tolerance) for guess in guesses)


def _smallest(log_failure: float, sigma: float, alpha: float, n: int, n_min: int, tolerance: float) -> int:
    target = expected_radius(log_failure, n, sigma, alpha) - tolerance
    if target <= 0:
        return n_min  # an abstention, or a radius within the tolerance of one
    low, high = math.log(n_min), math.log(n)
    if expected_radius(log_failure, n_min, sigma, alpha) >= target:
        return n_min
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        enough = expected_radius(log_failure, round(math.exp(middle)), sigma, alpha) >= target
        low, high = (low, middle) if enough else (middle, high)
    return min(n, math.ceil(math.exp(high)))
