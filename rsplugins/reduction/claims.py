r"""The claims of Smooth-Reduce, one for each noise mode, each with its proof. No torch.

Notation: R resizes, L cuts the P windows out of the resized image, m is the largest number of windows that cover one pixel, f
is the classifier, d a perturbation of the raw image; ||L||_2 = sqrt(m) (see ``windows``).

``common``: F(x) = argmax reduce_i f(L_i R x) is a classifier of the raw image and the noise is added to the raw image, so
theorem 1 of Cohen et al. (ICML 2019) holds for it as it is: no correction, for any reduction and any *fixed* set of windows.

``independent``: the votes are those of X -> argmax reduce_i f(X_i) under N(0, sigma^2 I) in the lifted space, at X = L R x.
Theorem 1 there certifies ||L R d|| <= sigma Phi^-1(p). Since ||L R d|| <= sqrt(m) ||R|| ||d||, the raw image is certified
within sigma Phi^-1(p) / (sqrt(m) ||R||). The published radius leaves the divisor out; it is too large by up to sqrt(m)
(identical windows and a linear classifier attain it), so ``as-published`` is an ESTIMATE.

``soft``: G_c(x) = E[score_c], scores in [0, 1], and Phi^-1 o G_c is 1/sigma-Lipschitz (Salman et al., NeurIPS 2019, lemma 2).

* Common noise on the raw image: the scores are a function of x + z; no correction.
* Independent noise, mean of probabilities: G_c(x) = (1/P) sum_i g_c(L_i R x) with g_c the soft-smoothed f of one window. Each
  window moves by at most t = ||R|| ||d||, so g_c falls at most to h(g_c), h(p) = Phi(Phi^-1(p) - t/sigma). h is convex, so by
  Jensen G_c(x + d) >= (1/P) sum_i h(g_c(L_i R x)) >= h(G_c(x)): the divisor is ||R|| alone, whatever the overlap.
* Independent noise, any other reduction: a function of the lifted X, so the divisor is sqrt(m) ||R|| as above.

The scores of one image sum to 1 for a mean of probabilities and for the softmax of reduced logits, and only then may the others
be bounded by 1 - p_A. Under max and min of probabilities they do not (25 windows can give a sum of 6.95), so every class is
bounded by itself, at alpha/K each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rsplugins.certificate import Claim, Evidence, Guarantee
from rsplugins.errors import RunError
from rsplugins.reduction.plan import Plan, make_plan
from rsplugins.statistics.claims import COHEN, soft_claim, votes_claim


def smooth_reduce(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of the certifier ``smooth-reduce``.

    Args:
        evidence: what ``gaussian`` (votes) or ``gaussian-soft`` (scores) stores, and ``geometry``: the input's shape
            and the size that the classifier takes, from which the windows and both norms are computed again.
        parameters: sigma, alpha, n0, n; noise, soft_noise, reduce, scores; stride, number, resize.

    Returns:
        The claim; an ESTIMATE for ``as-published``.

    Raises:
        RunError: damaged evidence.
    """
    plan = _plan(evidence, parameters)
    divide_by = divisor(plan, parameters)
    noise = parameters["noise"]
    if noise == "soft":
        return soft_claim(evidence, {**parameters, "runner_up": runner_up(parameters)}, divide_by=divide_by)
    claim = votes_claim(
        evidence, parameters, divide_by=divide_by, theorem=COHEN if noise == "common" else f"{COHEN}, lifted space"
    )
    if noise != "as-published":
        return claim
    return replace(
        claim,
        guarantee=Guarantee.ESTIMATE,
        alpha=None,
        rule=f"{claim.rule}, not divided by the lifted map's norm {plan.lifted_norm:.4g}: not a certificate",
    )


def divisor(plan: Plan, parameters: Mapping[str, Any]) -> float:
    """Return what the radius in the space of the noise is divided by, as derived at the head of this module."""
    noise = parameters["noise"]
    if noise == "independent":
        return plan.lifted_norm
    if noise == "soft" and parameters["soft_noise"] == "independent":
        averages = parameters["reduce"] == "mean" and parameters["scores"] == "probabilities"
        return plan.norm if averages else plan.lifted_norm
    return 1.0


def runner_up(parameters: Mapping[str, Any]) -> str:
    """Return how soft mode bounds the other classes: ``"complement"`` (1 - p_A) only where the scores sum to 1."""
    sums_to_one = parameters["reduce"] == "mean" or parameters["scores"] == "logits"
    return "complement" if sums_to_one else "bounded"


def _plan(evidence: Evidence, parameters: Mapping[str, Any]) -> Plan:
    try:
        geometry = evidence["geometry"]
        return make_plan(geometry["shape"], geometry["size"], parameters)
    except (KeyError, TypeError) as error:
        raise RunError(
            "The evidence does not say which windows it was gathered on.",
            cause=f"{type(error).__name__}: {error}",
            fix="Run again.",
        ) from error
