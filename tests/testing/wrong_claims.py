"""Torch-free claims of the wrong certifiers."""

from __future__ import annotations

import math
from dataclasses import replace

from scipy.stats import norm

from rsplugins import Claim, Guarantee, Norm
from rsplugins.reduction.claims import smooth_reduce
from rsplugins.statistics import claims, clopper_pearson_lower, vote_radius


def right(evidence, parameters):
    return claims.votes_claim(evidence, parameters)


def times_one_point_one(evidence, parameters):
    claim = right(evidence, parameters)
    return replace(claim, radius=1.1 * claim.radius)


def _claim(chosen, radius, parameters):
    radius = float(max(radius, 0.0))
    kind = Guarantee.PROBABILISTIC
    return Claim(chosen if radius > 0 else None, radius, kind, Norm.L2, parameters["alpha"], "wrong", ("float-idealised",))


def ppf_and_cdf_swapped(evidence, parameters):
    chosen = max(evidence["selection"], key=evidence["selection"].get)
    p = float(clopper_pearson_lower(evidence["estimation"].get(chosen, 0), parameters["n"], parameters["alpha"]))
    return _claim(int(chosen), parameters["sigma"] * norm.cdf(p) if p > 0.5 else 0.0, parameters)


def best_look(evidence, parameters):
    chosen = int(max(evidence["selection"], key=evidence["selection"].get))
    sigma, alpha = parameters["sigma"], parameters["alpha"]
    return _claim(chosen, max(vote_radius(look[chosen], sum(look), alpha, sigma) for look in evidence["looks"]), parameters)


def patches(evidence, parameters):
    settings = {"soft_noise": "common", "reduce": "mean", "scores": "logits", "stride": None, "number": None, "resize": "auto"}
    claim = smooth_reduce(evidence, {**settings, **parameters, "noise": "as-published", "window": None})
    return replace(claim, guarantee=Guarantee.PROBABILISTIC, alpha=parameters["alpha"])


def complement(evidence, parameters):
    chosen = max(evidence["selection"]["sums"], key=evidence["selection"]["sums"].get)
    mean = evidence["estimation"]["sums"][chosen] / parameters["n"]
    lower = mean - (-math.log(parameters["alpha"]) / (2 * parameters["n"])) ** 0.5
    return _claim(int(chosen), parameters["sigma"] * norm.ppf(min(lower, 1.0)) if lower > 0.5 else 0.0, parameters)


def margin(evidence, parameters):
    radius = evidence["margin"] / 2**0.5 / evidence["lipschitz"]
    kind = Guarantee.DETERMINISTIC
    return Claim(evidence["class"] if radius > 0 else None, max(0.0, radius), kind, Norm.L2, None, "wrong")
