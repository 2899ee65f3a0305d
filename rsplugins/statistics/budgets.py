"""How alpha is shared, and how many samples a claim needs before anything is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rsplugins.errors import ImpossibleBudgetError, ParameterError
from rsplugins.statistics._checks import check_alpha, check_positive, check_trials
from rsplugins.statistics.bounds import betting_lower, clopper_pearson_lower, empirical_bernstein_lower, hoeffding_lower
from rsplugins.statistics.radii import radius_from_one_bound, round_down
from rsplugins.statistics.sequences import sequence_lower

BoundName = Literal["clopper-pearson", "sequence", "hoeffding", "empirical-bernstein", "betting"]

USEFUL_RADIUS = 0.01
"""In units of sigma. A budget is called impossible when even unanimous samples certify no radius above this: a certified radius
of a hundredth of the noise level is nothing anybody can use, and votes that are exactly unanimous are rare at such radii. (At n
= 10 and alpha = 0.001 the largest radius is 0.00297 sigma: positive, and of no use.)"""

LARGEST_N = 2**40

# The bound when every sample agrees: the best that n samples can do. Empirical Bernstein needs two for a variance.
_BEST: dict[BoundName, Callable[[int, float], float]] = {
    "clopper-pearson": lambda n, alpha: float(clopper_pearson_lower(n, n, alpha)),
    "sequence": lambda n, alpha: float(sequence_lower(n, n, alpha)),
    "hoeffding": lambda n, alpha: hoeffding_lower(float(n), n, alpha),
    "empirical-bernstein": lambda n, alpha: empirical_bernstein_lower(float(n), float(n), n, alpha) if n > 1 else 0.0,
    "betting": lambda n, alpha: betting_lower([1.0], alpha, counts=[n]),
}


def bonferroni(alpha: float, *, classes: int = 1, looks: int = 1, inputs: int = 1) -> float:
    """The alpha of one bound so that all bounds hold together with probability 1 - alpha.

    This is Bonferroni's (that is, Boole's) inequality: no independence is needed. ``inputs`` turns the alpha of a single
    certificate into one for a whole data set: at 0.001 each, 500 certificates contain a false one with probability up to 39 %.

    Args:
        alpha: the chance that any bound is wrong, in (0, 1).
        classes: bounds an input needs, one per class, >= 1.
        looks: how often each is looked at before sampling stops, >= 1. A confidence sequence needs no such factor.
        inputs: certificates that must hold together, >= 1.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> bonferroni(0.001, classes=10)
        0.0001
        >>> bonferroni(0.05, inputs=500, looks=2)
        5e-05
    """
    parts = check_trials(classes, name="classes") * check_trials(looks, name="looks") * check_trials(inputs, name="inputs")
    return check_alpha(alpha) / parts


def largest_radius(n: int, *, sigma: float, alpha: float, bound: BoundName = "clopper-pearson", divide_by: float = 1.0) -> float:
    """The radius that n unanimous samples certify: no outcome gives more.

    Args:
        n: samples, >= 1.
        sigma: standard deviation of the noise, > 0.
        alpha: in (0, 1); already shared out (see :func:`bonferroni`) when there are several bounds.
        bound: ``"clopper-pearson"``, ``"sequence"`` (votes with early stopping), ``"hoeffding"``, ``"empirical-bernstein"``,
            ``"betting"``.
        divide_by: as in :func:`rsplugins.statistics.radii.radius_from_one_bound`.

    Raises:
        ParameterError: when an argument is out of range or the bound has another name.

    Example:
        >>> round(largest_radius(100_000, sigma=1.0, alpha=0.001), 4)
        3.8115
    """
    if bound not in _BEST:
        raise ParameterError(f"There is no bound named {bound!r}.", fix=f"Use one of: {', '.join(_BEST)}.")
    return radius_from_one_bound(_BEST[bound](check_trials(n), check_alpha(alpha)), sigma, divide_by=divide_by)


def smallest_n(
    radius: float | None = None, *, sigma: float, alpha: float, bound: BoundName = "clopper-pearson", divide_by: float = 1.0
) -> int:
    """The smallest number of samples that could certify a radius, were they unanimous.

    Args:
        radius: the radius that must be reached, >= 0; 0 means any above 0, None the useful minimum (:data:`USEFUL_RADIUS`).
        sigma: standard deviation of the noise, > 0.
        alpha: as in :func:`largest_radius`.
        bound: as in :func:`largest_radius`.
        divide_by: as in :func:`largest_radius`.

    Raises:
        ParameterError: when an argument is out of range.
        ImpossibleBudgetError: when not even 2^40 samples are enough.

    Example:
        >>> smallest_n(0.75, sigma=0.25, alpha=0.001)
        5114
        >>> smallest_n(sigma=0.25, alpha=0.001), smallest_n(0.0, sigma=0.25, alpha=0.001)
        (11, 10)
    """
    target = _target(radius, sigma, divide_by)

    def enough(n: int) -> bool:
        found = largest_radius(n, sigma=sigma, alpha=alpha, bound=bound, divide_by=divide_by)
        return found > 0 and found >= target

    high = 1
    while not enough(high):
        high *= 2
        if high > LARGEST_N:
            raise ImpossibleBudgetError(
                f"No number of samples up to 2^40 certifies radius {target:g} at sigma = {sigma:g}, alpha = {alpha:g}.",
                cause="The radius is many times sigma, and a sampled radius grows only with the logarithm of n.",
                fix=f"Use a larger sigma (at least about {target * divide_by / 4:g}) or a smaller radius.",
            )
    low = high // 2  # enough(n) is monotone: one more agreeing sample never lowers the bound
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def check_budget(
    n: int,
    *,
    sigma: float,
    alpha: float,
    bound: BoundName = "clopper-pearson",
    radius: float | None = None,
    divide_by: float = 1.0,
) -> None:
    """Refuse a number of samples with which no outcome could certify a useful radius, before anything is run.

    Args:
        n: samples for the estimate, >= 1.
        sigma: standard deviation of the noise, > 0.
        alpha: as in :func:`largest_radius`.
        bound: as in :func:`largest_radius`.
        radius: what must be in reach; None for :data:`USEFUL_RADIUS` times sigma (over ``divide_by``).
        divide_by: as in :func:`largest_radius`.

    Raises:
        ImpossibleBudgetError: naming the smallest n that could work.
        ParameterError: when an argument is out of range.

    Example:
        >>> check_budget(10, sigma=0.25, alpha=0.001)
        Traceback (most recent call last):
        ...
        rsplugins.errors.ImpossibleBudgetError: n = 10 samples at alpha = 0.001 can certify nothing of use; the smallest n ...
        ...
    """
    best = largest_radius(n, sigma=sigma, alpha=alpha, bound=bound, divide_by=divide_by)
    target = _target(radius, sigma, divide_by)
    if best > 0 and best >= target:
        return
    needed = smallest_n(radius, sigma=sigma, alpha=alpha, bound=bound, divide_by=divide_by)
    least = "the least radius that counts as useful" if radius is None else "the radius asked for"
    raise ImpossibleBudgetError(
        f"n = {n} samples at alpha = {alpha:g} can certify nothing of use; the smallest n that could is {needed}.",
        cause=f"Even if all {n} samples agree, the {bound} bound gives a radius of {round_down(best / sigma, 4)} sigma, "
        f"below {target / sigma:.4f} sigma, {least}.",
        fix=f"Set n to at least {needed} (n = 1000 is a usual minimum, 100000 the usual choice), or raise alpha.",
    )


def _target(radius: float | None, sigma: float, divide_by: float) -> float:
    sigma, divide_by = check_positive(sigma, "sigma"), check_positive(divide_by, "divide_by")
    if radius is None:
        return USEFUL_RADIUS * sigma / divide_by
    if not 0 <= radius < float("inf"):
        raise ParameterError(
            f"radius = {radius!r} must be finite and at least 0.", fix="Use a radius in raw pixels, such as 0.25."
        )
    return float(radius)
