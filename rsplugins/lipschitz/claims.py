"""Claims of the certifiers ``latent`` and ``lipschitz-margin``: pure functions of the evidence, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rsplugins.certificate import BESIDE, Claim, Evidence, Guarantee, Norm
from rsplugins.errors import RunError
from rsplugins.statistics.claims import ASSUMPTIONS, votes_claim
from rsplugins.statistics.radii import RADIUS_SLACK, round_down

LATENT = "cohen-2019 theorem 1 in the latent, divided by a Lipschitz bound of the encoder"
LOCAL = "cohen-2019 theorem 1 in the latent, divided by a local Lipschitz bound of the encoder"
MARGIN = "margin over a Lipschitz bound of the difference of logits"


def latent(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    r"""The claim of ``latent``, about the smoothed classifier :math:`F(x) = \arg\max_c P_\eta[h(g(x) + \eta) = c]`.

    **Global.** Cohen's theorem for the function h at the point g(x) gives a radius :math:`R_z` within which no latent changes the
    class, with confidence :math:`1 - \alpha`. Since :math:`\|g(x') - g(x)\| \le L \|x' - x\|`, no image closer than :math:`R_z /
    L` changes it.

    **Local.** Let :math:`L_\gamma` bound the Lipschitz constant of g on the ball of radius :math:`\gamma` around x. An image x'
    at a distance below :math:`\min(R_z / L_\gamma, \gamma)` lies in that ball, so :math:`\|g(x') - g(x)\| \le L_\gamma \|x' - x\|
    < R_z`, and F(x') = F(x). So each :math:`\gamma` gives a valid radius, and so does the largest of them: they all follow from
    the one event that the confidence bound of the votes holds, and the :math:`L_\gamma` are deterministic, so no alpha is spent
    on the choice.

    **Beside the margin.** Evidence may hold a margin certificate of the plain classifier :math:`h(g(x))`. It says nothing about
    F: the two agree at x, but not necessarily at x', so the larger of the two radii holds for neither classifier over its whole
    ball. Hence the radius stays that of F; where the plain classifier has the same class and a larger radius, the assumptions say
    so and name it.

    Args:
        evidence: votes as for ``gaussian``, ``"lipschitz"`` (L), optionally ``"local"`` ([[gamma, L_gamma], ...]), ``"margin"``
        (as
            for :func:`lipschitz_margin`) and ``"head_normalises"`` (layers of the head, for the record).
        parameters: ``sigma`` (in latent units), ``alpha``, ``n0``, ``n``.

    Raises:
        RunError: when the evidence contradicts itself or the parameters.

    Example:
        >>> votes = {"selection": {"3": 100}, "estimation": {"3": 10_000}}
        >>> parameters = {"sigma": 1.0, "alpha": 0.001, "n0": 100, "n": 10_000}
        >>> round(latent({**votes, "lipschitz": 2.0}, parameters).radius, 4)
        1.5993
        >>> round(latent({**votes, "lipschitz": 2.0, "local": [[3.0, 1.0], [9.0, 1.9]]}, parameters).radius, 4)
        3.0
    """
    best = votes_claim(evidence, parameters, divide_by=_bound(evidence["lipschitz"], "lipschitz"), theorem=LATENT)
    if best.prediction is None:
        return best
    for gamma, constant in evidence.get("local", ()):
        gamma = _bound(gamma, "gamma")
        # A constant of 0 (the encoder does not move in the ball) is one of any size, however small.
        inside = votes_claim(evidence, parameters, divide_by=max(_bound(constant, "local", zero=True), 1e-30), theorem=LOCAL)
        radius = min(inside.radius, gamma)
        if radius > best.radius:
            best = replace(inside, radius=radius)
    if evidence.get("head_normalises"):
        note = f"the head normalises the latent again ({', '.join(evidence['head_normalises'])}): part of what is smoothed"
        best = replace(best, assumptions=(*best.assumptions, note))
    return _beside(best, evidence)


def _beside(claim: Claim, evidence: Evidence) -> Claim:
    if evidence.get("margin") is None:
        return claim
    plain = lipschitz_margin(evidence["margin"], {})
    if plain.prediction != claim.prediction or plain.radius <= claim.radius:
        return claim
    note = f"{BESIDE}, is certified further by lipschitz-margin: {round_down(plain.radius, 6)}"
    return replace(claim, assumptions=(*claim.assumptions, note))


def lipschitz_margin(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    r"""The claim of ``lipschitz-margin``, about the classifier itself.

    For a rival class k let :math:`L_{Ak}` bound the Lipschitz constant of :math:`f_A - f_k`. Then :math:`f_A(x') - f_k(x') \ge
    f_A(x) - f_k(x) - L_{Ak} \|x' - x\|`, which is positive within :math:`(f_A(x) - f_k(x)) / L_{Ak}`; the radius is the least of
    these over k. :math:`L_{Ak} = \min(\sqrt 2 L, \|w_A - w_k\| L_{\mathrm{features}})`: the difference is :math:`\langle e_A -
    e_k, f \rangle`, with :math:`\|e_A - e_k\| = \sqrt 2`, and behind a last linear layer also :math:`\langle w_A - w_k,
    \mathrm{features} \rangle`. Tsuzuku, Sato, Sugiyama (NeurIPS 2018), propositions 1 and 2.

    Args:
        evidence: ``{"prediction": A, "rival": k, "margin": f_A(x) - f_k(x), "constant": L_Ak}`` of the rival that is nearest.
        parameters: not read.

    Raises:
        RunError: when a number is out of range.

    Example:
        >>> claim = lipschitz_margin({"prediction": 3, "rival": 5, "margin": 1.0, "constant": 2.0}, {})
        >>> claim.prediction, round(claim.radius, 6)
        (3, 0.5)
    """
    constant = _bound(evidence["constant"], "constant")
    margin = float(evidence["margin"])
    if not math.isfinite(margin):
        raise RunError(f"The evidence has margin {margin!r}.", cause="a damaged or edited record.", fix="Certify again.")
    radius = max(0.0, margin / constant * (1.0 - RADIUS_SLACK))
    prediction = int(evidence["prediction"]) if radius > 0 else None
    return Claim(prediction, radius, Guarantee.DETERMINISTIC, Norm.L2, None, MARGIN, ASSUMPTIONS)


def _bound(value: Any, name: str, *, zero: bool = False) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0)):
        return float(value)
    raise RunError(
        f"The evidence has {name} {value!r}; expected a positive finite number.",
        cause="a damaged or edited record.",
        fix="Certify again.",
    )
