"""Radii read out of a logit Gaussian, and claims of the covariance certifiers; no torch.

Evidence of one input, as :mod:`rsplugins.moments.estimator` gathers it::

    {"kept": [class numbers, the largest mean first], "mean": [...], "covariance": [[...], ...], "others": log of the summed
     probabilities that a class that is not kept beats the first, or None when all are kept,
     "linearised": [names of the operators without a moment rule]}, the last where there are any
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp, ndtri_exp

from rsplugins.certificate import Claim, Evidence, Guarantee, Norm
from rsplugins.errors import ParameterError, RunError
from rsplugins.statistics import vote_radius

Vector = NDArray[np.float64]

RULES = ("union", "sampled", "pairwise", "as-published")
KEPT = 20
"""Classes whose covariance a record holds: a table of 1,000 classes would be megabytes."""

_DRAWS = 4096
_FAR = 1e9  # margins of more standard deviations than this are not told apart
_SLACK = 1e-9
_HALF = math.log(0.5)


def standardised_margins(evidence: Evidence) -> Vector:
    """Return (mu_A - mu_k) / sd(logit_A - logit_k) for every kept class k but the first.

    Raises:
        RunError: when the evidence is no Gaussian: shapes, order, symmetry, signs.
    """
    gap, spread = _margins(evidence)
    z: Vector = np.minimum(gap, _FAR * spread) / np.maximum(spread, 1e-300)
    return np.clip(z, 0.0, _FAR)


def log_failure(evidence: Evidence, rule: str = "union") -> float:
    r"""Return the logarithm of the probability, under the Gaussian, that the class of the largest mean does not win.

    ``"union"`` adds up the classes' probabilities of beating it, an upper bound. ``"sampled"`` estimates the probability without
    bias, with a relative standard error below 2 % however small it is: 4,096 draws of importance sampling for a union of rare
    events (Owen, Maximov, Chertkov, Electronic Journal of Statistics 2019), which conditions on one of the events at a time and
    divides by how many happened. The draws are fixed, so the number is a function of the evidence.

    Example:
        >>> evidence = {"kept": [0, 1], "mean": [1.0, 0.0], "covariance": [[0.5, 0.0], [0.0, 0.5]], "others": None}
        >>> round(math.exp(log_failure(evidence)), 6), round(math.exp(log_failure(evidence, "sampled")), 6)
        (0.158655, 0.158655)
    """
    z = standardised_margins(evidence)
    events = log_ndtr(-z)
    total = float(logsumexp(events)) if len(events) else -math.inf
    if rule == "sampled" and len(events) > 1 and total > -math.inf:
        total += math.log(_share_of_union(evidence, events))
    others = evidence.get("others")
    return float(np.logaddexp(total, others)) if others is not None else total


def _share_of_union(evidence: Evidence, events: Vector) -> float:
    """Return the probability of the union of the events over the sum of their probabilities."""
    gap, spread = _margins(evidence)
    covariance = np.asarray(evidence["covariance"], dtype=float)
    table = covariance[0, 0] + covariance[1:, 1:] - covariance[:1, 1:] - covariance[1:, :1]
    values, vectors = np.linalg.eigh(0.5 * (table + table.T))
    root = vectors * np.sqrt(values.clip(0))
    generator = np.random.default_rng(20210408)
    weights = np.exp(events - logsumexp(events))
    # systematic: every event gets its share of the draws, up to one
    places = (np.arange(_DRAWS) + generator.random()) / _DRAWS
    which = np.minimum(np.searchsorted(np.cumsum(weights), places), len(weights) - 1)
    depth = ndtri_exp(np.log1p(-generator.random(_DRAWS)) + events[which])  # a normal below -z, in units of its deviation
    target = spread[which] * depth
    free = generator.standard_normal((_DRAWS, len(gap))) @ root.T
    variance = np.maximum(spread[which] ** 2, 1e-300)
    draws = gap + free + table[which] * ((target - free[np.arange(_DRAWS), which]) / variance)[:, None]
    happened = draws < 0
    happened[np.arange(_DRAWS), which] = True
    return float((1.0 / happened.sum(1)).mean())


def estimated_radius(evidence: Evidence, sigma: float, rule: str) -> float:
    """Return the radius that a rule reads out of the Gaussian, in raw pixels; 0.0 for none. An estimate, whatever the rule.

    Args:
        evidence: see the module.
        sigma: of the propagated noise.
        rule: ``"union"`` or ``"sampled"``: sigma Phi^-1 of the class's probability; ``"pairwise"``: of the probability of beating
            the closest class alone; ``"as-published"``: Zhen et al., from the two largest means with |S_AB|.
    """
    if rule not in RULES:
        raise ParameterError(f"There is no rule {rule!r} for the radius.", fix=f"Use one of: {', '.join(RULES)}.")
    if rule == "pairwise":
        return float(sigma * standardised_margins(evidence).min(initial=_FAR))
    if rule == "as-published":
        gap, _ = _margins(evidence)
        s = evidence["covariance"]
        spread = math.sqrt(max(s[0][0] + s[1][1] + 2 * abs(s[0][1]), 1e-300))
        return float(sigma * min(gap[0] / spread, _FAR))
    failure = log_failure(evidence, rule)
    return 0.0 if failure >= _HALF else float(sigma * min(-ndtri_exp(failure), _FAR))


def covariance(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of ``covariance``: an ESTIMATE of the radius that sampling would give.

    Args:
        evidence: see the module.
        parameters: ``sigma``, ``rule``.

    Example:
        >>> evidence = {"kept": [7, 2], "mean": [1.0, 0.0], "covariance": [[0.5, 0.0], [0.0, 0.5]], "others": None}
        >>> claim = covariance(evidence, {"sigma": 0.25, "rule": "union"})
        >>> claim.prediction, round(claim.radius, 6), str(claim.guarantee)
        (7, 0.25, 'estimate')
    """
    rule = parameters["rule"]
    radius = estimated_radius(evidence, parameters["sigma"], rule) * (1 - _SLACK)
    return Claim(
        prediction=int(evidence["kept"][0]) if radius > 0 else None,
        radius=max(radius, 0.0),
        guarantee=Guarantee.ESTIMATE,
        norm=Norm.L2,
        alpha=None,
        rule=f"propagated covariance, {rule}",
        assumptions=_assumptions(evidence),
    )


def _assumptions(evidence: Evidence) -> tuple[str, ...]:
    linear = evidence.get("linearised", [])
    if not (isinstance(linear, list) and all(isinstance(name, str) for name in linear)):
        raise RunError("The evidence names linearised operators by something else than a list of names.", fix="Run it anew.")
    said = (f"linearised at the mean, without a correction: {', '.join(linear)}",) if linear else ()
    return ("the activations are taken for jointly Gaussian", *said)


def covariance_guided(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of ``covariance-guided``: PROBABILISTIC, from the votes alone.

    The class and the number of samples are functions of the model and the input, fixed before any sample is drawn, so the votes
    are binomial with that number of trials, Clopper-Pearson holds, and all of alpha goes into it. How good the propagated
    estimate is has no part in the proof.

    Args:
        evidence: ``{"class": 3, "n": 8000, "failure": log probability, "estimation": {"3": 7990, "5": 10}}``.
        parameters: ``sigma``, ``alpha``, ``n``, ``n_min``.

    Raises:
        RunError: when the votes are not n, or n is not what the parameters allow.

    Example:
        >>> evidence = {"class": 3, "n": 10_000, "failure": -6.9, "estimation": {"3": 9_990, "5": 10}}
        >>> claim = covariance_guided(evidence, {"sigma": 0.25, "alpha": 0.001, "n": 100_000, "n_min": 500})
        >>> claim.prediction, round(claim.radius, 4)
        (3, 0.7046)
    """
    votes, trials = evidence["estimation"], evidence["n"]
    counts = list(votes.values())
    good = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    if not good or sum(counts) != trials or not parameters["n_min"] <= trials <= parameters["n"]:
        raise RunError(
            f"The evidence holds {sum(counts) if good else 'damaged'} votes for n = {trials!r}, and the parameters allow "
            f"{parameters['n_min']} to {parameters['n']}.",
            cause="The record was edited or damaged, or belongs to other parameters.",
            fix="Run `rsplugins certify` again for this input.",
        )
    chosen = evidence["class"]
    radius = vote_radius(votes.get(str(chosen), 0), trials, parameters["alpha"], parameters["sigma"])
    return Claim(
        prediction=int(chosen) if radius > 0 else None,
        radius=radius,
        guarantee=Guarantee.PROBABILISTIC,
        norm=Norm.L2,
        alpha=float(parameters["alpha"]),
        rule="cohen-2019 theorem 1, clopper-pearson, class and n by propagated covariance",
        assumptions=("float-idealised",),
    )


def _margins(evidence: Evidence) -> tuple[Vector, Vector]:
    mean, covariance = (np.asarray(evidence.get(name), dtype=float) for name in ("mean", "covariance"))
    count = len(evidence.get("kept", ()))
    shapes = mean.shape == (count,) and covariance.shape == (count, count) and count >= 2
    if not (shapes and np.isfinite(mean).all() and np.isfinite(covariance).all() and (mean[1:] <= mean[0]).all()):
        raise RunError(
            "The evidence is no Gaussian of at least two logits with the largest mean first.",
            cause="The record was edited or damaged.",
            fix="Run `rsplugins certify` again for this input.",
        )
    variance = covariance[0, 0] + covariance.diagonal()[1:] - 2 * covariance[0, 1:]
    return mean[0] - mean[1:], np.sqrt(variance.clip(0))
