"""Claims read out of evidence by statistics alone: pure functions, no model, no torch.

``rsplugins verify`` and ``rsplugins rescore`` call these. Every number is recomputed from the counts and sums; evidence that
contradicts itself or the parameters is a damaged run and raises :class:`~rsplugins.errors.RunError`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from rsplugins.certificate import Claim, Evidence, Guarantee, Norm
from rsplugins.errors import ParameterError, RunError
from rsplugins.statistics.bounds import (
    clopper_pearson_lower,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
)
from rsplugins.statistics.budgets import bonferroni
from rsplugins.statistics.grid import LEVELS, total_variation
from rsplugins.statistics.radii import radius_from_one_bound, radius_from_two_bounds
from rsplugins.statistics.sequences import sequence_lower

COHEN = "cohen-2019 theorem 1"
SALMAN = "salman-2019 lemma 2"
ASSUMPTIONS = ("float-idealised",)
GRID_ASSUMPTIONS = ("among images on the 8-bit grid k/255",)

_SUM_TOLERANCE = 1e-6  # finds scores that are no probabilities; the bounds have their own, proven, slack


def vote_radius(
    successes: int,
    trials: int,
    alpha: float,
    sigma: float,
    *,
    sequence: bool = False,
    divide_by: float = 1.0,
    slack: float = 0.0,
) -> float:
    """The certified l2 radius of k votes out of n under Gaussian noise, rounded down; 0.0 means abstain.

    Args:
        successes: votes for the class, which was chosen without looking at these votes, 0..trials.
        trials: votes in all, >= 1.
        alpha: probability of a false claim, in (0, 1).
        sigma: standard deviation of the noise, > 0.
        sequence: whether the number of trials depended on the votes (early stopping): the confidence sequence then replaces
            Clopper-Pearson, which is valid at a fixed number only.
        divide_by: the operator norm (or an upper bound of it) of what lies between the image and the noise, > 0.
        slack: how far the probabilities under the noise drawn may be from those under Gaussian noise; see :func:`sampling_slack`.

    Raises:
        ParameterError: when an argument is out of range.

    Example:
        >>> round(vote_radius(10_000, 10_000, 0.001, 1.0), 4)
        3.1986
        >>> vote_radius(50, 100, 0.001, 1.0)
        0.0
    """
    bound = sequence_lower if sequence else clopper_pearson_lower
    return radius_from_one_bound(max(0.0, float(bound(successes, trials, alpha)) - slack), sigma, divide_by=divide_by)


_known_radius = functools.lru_cache(maxsize=2**15, typed=True)(vote_radius)
"""Many inputs of a run have the same votes, and a run is scored several times."""


def sampling_slack(evidence: Evidence, parameters: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """How far the noise drawn is from Gaussian noise in total variation, and what the claim assumes besides.

    Args:
        evidence: with ``"grid": {"levels": 255, "elements": d}`` when the noise was drawn on the grid of 8-bit images; see
            :mod:`rsplugins.statistics.grid`.
        parameters: ``sigma``.

    Returns:
        For the standard sampler 0.0 and ``("float-idealised",)``: its sums are taken for exact.

    Raises:
        RunError: damaged evidence.
    """
    if "grid" not in evidence:
        return 0.0, ASSUMPTIONS
    found = evidence["grid"]
    elements = found.get("elements") if isinstance(found, Mapping) else None
    if not isinstance(elements, int) or elements < 1 or found.get("levels") != LEVELS:
        raise _damaged(f"The evidence says that the noise was drawn on the grid {found!r}.")
    return elements * total_variation(parameters["sigma"]), GRID_ASSUMPTIONS


def votes_claim(evidence: Evidence, parameters: Mapping[str, Any], *, divide_by: float = 1.0, theorem: str = COHEN) -> Claim:
    """The claim from hard votes with separate selection and estimation samples, for this certifier and others built on votes.

    Args:
        evidence: ``{"selection": {"3": 97, "5": 3}, "estimation": {"3": 9990, "5": 10}}``: votes by class (classes without
            votes may be left out), from separate samples.
        parameters: ``sigma``, ``alpha``, ``n0``, ``n``; optionally ``stop_at``, the radii at which sampling could stop early:
            when it is not empty, n is the most estimation votes there may be, and the bound is the confidence sequence.
        divide_by: as in :func:`vote_radius`.
        theorem: what the radius formula rests on; the rule adds the bound.

    Returns:
        The class with most selection votes (of equals, the smallest index) and its radius, or an abstention when the lower bound
        of its probability is not above 1/2.

    Raises:
        RunError: when the evidence contradicts itself or the parameters.
        ParameterError: when a parameter is out of range.

    Example:
        >>> evidence = {"selection": {"3": 97, "5": 3}, "estimation": {"3": 9990, "5": 10}}
        >>> claim = votes_claim(evidence, {"sigma": 0.25, "alpha": 0.001, "n0": 100, "n": 10_000})
        >>> claim.prediction, round(claim.radius, 4), claim.rule
        (3, 0.7046, 'cohen-2019 theorem 1, clopper-pearson')
    """
    sequence = bool(parameters.get("stop_at"))
    selection = _counts(evidence, "selection", parameters["n0"])
    estimation = _counts(evidence, "estimation", parameters["n"], exactly=not sequence)
    chosen = max(sorted(selection), key=selection.__getitem__)
    slack, assumptions = sampling_slack(evidence, parameters)
    radius = _known_radius(
        estimation.get(chosen, 0),
        sum(estimation.values()),
        parameters["alpha"],
        parameters["sigma"],
        sequence=sequence,
        divide_by=divide_by,
        slack=slack,
    )
    rule = f"{theorem}, {'confidence sequence' if sequence else 'clopper-pearson'}"
    return _claim(chosen, radius, parameters, rule, assumptions)


def gaussian(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of the certifier ``gaussian``: Cohen et al. (ICML 2019), CERTIFY of section 3.2.2; see :func:`votes_claim`."""
    return votes_claim(evidence, parameters)


def gaussian_soft(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of the certifier ``gaussian-soft``; see :func:`soft_claim`."""
    return soft_claim(evidence, parameters)


def soft_claim(evidence: Evidence, parameters: Mapping[str, Any], *, divide_by: float = 1.0) -> Claim:
    r"""The claim of soft smoothing: :math:`G_c(x) = E_z[s_c(x + z)]` for scores s in [0, 1], such as class probabilities.

    :math:`\Phi^{-1}(G_c)` is :math:`1/\sigma`-Lipschitz in l2 (Salman et al., NeurIPS 2019, lemma 2), which gives two rules:

    * ``runner_up="complement"`` (default): the scores of an input sum to at most 1, so every other class is at most 1 - G_A, and
      R = sigma * Phi^-1(G_A lower) when G_A lower > 1/2. All of alpha goes into that one bound.
    * ``runner_up="bounded"``: R = sigma/2 * (Phi^-1(G_A lower) - Phi^-1(largest other upper)), every class bounded at alpha/K
      (Bonferroni). Needs no sum to 1 (max-reduced scores), and certifies below 1/2 when the rest is spread over many classes.

    Scores are to be computed and summed in float64, so that they sum to 1 and the slack of the bounds covers the summation.

    Args:
        evidence: ``{"classes": K, "selection": {"n": 100, "sums": {"3": 88.1}}, "estimation": {"n": 10000, "sums": {"3": 8810.2},
            "squares": {"3": 8123.4}}}``: sums of the scores, and of their squares, by class, from separate samples. For
            ``"complement"`` the sums of estimation may be left out but for the selected class (classes left out of selection
            count as 0); ``"bounded"`` needs K and every class.
        parameters: ``sigma``, ``alpha``, ``n0``, ``n``; ``bound``, ``"empirical-bernstein"`` (default) or ``"hoeffding"``;
            ``runner_up``.
        divide_by: as in :func:`vote_radius`.

    Raises:
        RunError: when the evidence contradicts itself or the parameters, or lacks what the rule needs.
        ParameterError: when a parameter is out of range.

    Example:
        >>> estimation = {"n": 10_000, "sums": {"3": 9_500.0}, "squares": {"3": 9_100.0}}
        >>> evidence = {"selection": {"n": 100, "sums": {"3": 95.0, "5": 5.0}}, "estimation": estimation}
        >>> claim = soft_claim(evidence, {"sigma": 0.25, "alpha": 0.001, "n0": 100, "n": 10_000})
        >>> claim.prediction, round(claim.radius, 4)
        (3, 0.3992)
    """
    selection = _sums(evidence, "selection", "sums", parameters["n0"])
    sums = _sums(evidence, "estimation", "sums", parameters["n"])
    squares = _sums(evidence, "estimation", "squares", parameters["n"])
    chosen = max(sorted(selection), key=selection.__getitem__)
    bound, rule = parameters.get("bound", "empirical-bernstein"), parameters.get("runner_up", "complement")
    if bound not in ("empirical-bernstein", "hoeffding") or rule not in ("complement", "bounded"):
        raise ParameterError(
            f"There is no soft claim with bound={bound!r} and runner_up={rule!r}.",
            fix='Use bound="empirical-bernstein" or "hoeffding", and runner_up="complement" or "bounded".',
        )
    n = int(parameters["n"])
    slack, assumptions = sampling_slack(evidence, parameters)
    if rule == "complement":
        _check_complement(sums, n)
        p_lower = _score_bounds(bound, sums, squares, chosen, n, parameters["alpha"])[0]
        radius = radius_from_one_bound(max(0.0, p_lower - slack), parameters["sigma"], divide_by=divide_by)
    else:
        classes = _check_all_classes(evidence, sums)
        share = bonferroni(parameters["alpha"], classes=classes)
        p_lower = _score_bounds(bound, sums, squares, chosen, n, share)[0]
        others = (_score_bounds(bound, sums, squares, other, n, share)[1] for other in range(classes) if other != chosen)
        largest = min(1.0, max(others, default=0.0) + slack)
        radius = radius_from_two_bounds(max(0.0, p_lower - slack), largest, parameters["sigma"], divide_by=divide_by)
    return _claim(chosen, radius, parameters, f"{SALMAN}, {bound}, runner-up {rule}", assumptions)


def _claim(chosen: int, radius: float, parameters: Mapping[str, Any], rule: str, assumptions: tuple[str, ...]) -> Claim:
    return Claim(
        prediction=chosen if radius > 0 else None,
        radius=radius,
        guarantee=Guarantee.PROBABILISTIC,
        norm=Norm.L2,
        alpha=float(parameters["alpha"]),
        rule=rule,
        assumptions=assumptions,
    )


def _counts(evidence: Evidence, part: str, n: int, *, exactly: bool = True) -> dict[int, int]:
    """Return votes by class as integers, checked against the number of samples."""
    votes = _table(evidence, part)
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in votes.values()):
        raise _damaged(f"The {part} votes {dict(evidence[part])!r} are not all non-negative integers.")
    total = sum(votes.values())
    if total < 1 or total > n or (exactly and total != n):
        raise _damaged(f"There are {total} {part} votes where the parameters say {'' if exactly else 'at most '}{n}.")
    return votes


def _sums(evidence: Evidence, part: str, name: str, n: int) -> dict[int, float]:
    """Return sums by class as floats, checked against the number of samples."""
    inner = evidence.get(part)
    if not isinstance(inner, Mapping) or inner.get("n") != n:
        found = inner.get("n") if isinstance(inner, Mapping) else None
        raise _damaged(f"The {part} scores are of {found!r} samples where the parameters say {n}.")
    sums = {label: float(total) for label, total in _table(inner, name).items()}
    if not all(math.isfinite(total) and 0 <= total <= n * (1 + _SUM_TOLERANCE) for total in sums.values()):
        raise _damaged(f"The {part} {name} {dict(inner[name])!r} cannot come from {n} scores in [0, 1].")
    return sums


def _table(evidence: Mapping[str, Any], name: str) -> dict[int, Any]:
    table = evidence.get(name)
    try:
        found = {int(label): value for label, value in table.items()}  # type: ignore[union-attr]
    except (AttributeError, ValueError, TypeError):
        raise _damaged(f"The evidence has no table by class called {name!r}: it holds {table!r}.") from None
    if not found or len(found) != len(table or ()) or min(found) < 0:
        raise _damaged(f"The table {name!r} is empty, or a class is negative or there twice: {table!r}.")
    return found


def _score_bounds(
    bound: str, sums: Mapping[int, float], squares: Mapping[int, float], label: int, n: int, alpha: float
) -> tuple[float, float]:
    """Return a lower and an upper bound of one class's mean score; each spends alpha, and a rule uses one of them."""
    if label not in sums or label not in squares:
        raise _damaged(f"The estimation holds no score sums of class {label}, which the claim needs.")
    try:
        if bound == "hoeffding":
            return hoeffding_lower(sums[label], n, alpha), hoeffding_upper(sums[label], n, alpha)
        return (
            empirical_bernstein_lower(sums[label], squares[label], n, alpha),
            empirical_bernstein_upper(sums[label], squares[label], n, alpha),
        )
    except ParameterError as error:
        raise _damaged(f"The score sums of class {label} do not fit together: {error.what}") from error


def _check_complement(sums: Mapping[int, float], n: int) -> None:
    if sum(sums.values()) > n * (1 + _SUM_TOLERANCE):
        raise RunError(
            f"The scores of all classes sum to {sum(sums.values()):g} over {n} samples, more than 1 a sample.",
            cause='The scores are no probabilities (max-reduced, say), and runner_up="complement" would overstate the radius.',
            fix='Use runner_up="bounded", which bounds every class.',
        )


def _check_all_classes(evidence: Evidence, sums: Mapping[int, float]) -> int:
    classes = evidence.get("classes")
    if not isinstance(classes, int) or sorted(sums) != list(range(classes)):
        raise RunError(
            f"The evidence holds score sums of {len(sums)} classes, but every one of {classes!r} must be bounded.",
            cause='The run was made with runner_up="complement", which keeps fewer.',
            fix='Use runner_up="complement", or make a new run with runner_up="bounded".',
        )
    return classes


def _damaged(what: str) -> RunError:
    return RunError(
        what,
        cause="The record was edited or damaged, or belongs to other parameters.",
        fix="Run `rsplugins certify` again for this input.",
    )
