"""Torch-free claims of the tiny plugin."""

from __future__ import annotations

from scipy.special import betaincinv, ndtri

from rsplugins import Claim, Guarantee, Norm


def votes(evidence, parameters):
    count, n, alpha = evidence["count"], parameters["n"], parameters["alpha"]
    lower = betaincinv(count, n - count + 1, alpha) if count else 0.0
    if lower <= 0.5:
        return Claim(None, 0.0, Guarantee.PROBABILISTIC, Norm.L2, alpha, "cohen-2019")
    radius = parameters["sigma"] * float(ndtri(lower)) * (1 - 1e-9)
    return Claim(evidence["class"], radius, Guarantee.PROBABILISTIC, Norm.L2, alpha, "cohen-2019", ("float-idealised",))


def margin(evidence, parameters):
    return Claim(evidence["class"], evidence["margin"] * (1 - 1e-9), Guarantee.DETERMINISTIC, Norm.L2, None, "linear-margin")


def guess(evidence, parameters):
    return Claim(evidence["class"], evidence["margin"] * parameters["factor"], Guarantee.ESTIMATE, Norm.L2, None, "guess")
