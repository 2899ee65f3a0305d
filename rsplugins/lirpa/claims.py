"""The claims of the bound certifiers, read out of margins' lower bounds; imports no torch.

Evidence of one input, as :mod:`rsplugins.lirpa.search` gathers it::

    {"logits": [K numbers],
     "certified": {"eps": 0.031, "margins": [K - 1 lower bounds]} or None,
     "refuted": {"eps": 0.032, "margins": [K - 1 lower bounds]} or None,
     "rounding": "outward" or absent}

``operators``, where plugins' bound operators took part, names them with their versions.

``margins`` holds lower bounds of logits[prediction] - logits[other] over the whole ball, the others in order. A bound that is not
a number is None and certifies nothing. Of more than 64 classes, what decides a claim is kept in place of the lists::

    {"logits": {"classes": K, "largest": largest absolute logit, "top": {class: logit, of the 8 largest}},
     "certified": {"eps": 0.031, "margins": {"of": K - 1, "smallest": {class: lower bound, of the 8 smallest}}}, ...}

``refuted`` means "not certified by this method", not that an adversarial example exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsplugins.certificate import CLIPPED, Claim, Evidence, Guarantee, Norm

SLACK = {"float64": 1e-10, "float32": 1e-5}
"""What a margin must exceed, relative to 1 + the largest logit, on top of the outward rounding of the bounds."""

ASSUMPTION = "float-idealised: of the network in exact arithmetic; bounds in {dtype}{rounded} with a relative slack of {slack:g}"

OUTWARD = "outward"
"""What evidence says under "rounding" when its margins are bounds whatever the rounding. Older evidence, which says nothing, was
left to the slack."""


OPERATORS = "bounds of {operators}{rounded}, as the plugin promises"


_MANY, _KEPT = 64, 8

Logits = Sequence[float] | Mapping[str, Any]
"""Of all classes, or what :func:`compact` keeps of them."""
Margins = Sequence[float | None] | Mapping[str, Any]
"""Lower bounds of all margins, or what :func:`compact` keeps of them."""


def compact(evidence: dict[str, Any]) -> dict[str, Any]:
    """Return evidence without what no claim depends on, where there are many classes; see the module.

    Example:
        >>> logits = [0.0] * 99 + [5.0]
        >>> small = compact({"logits": logits, "certified": {"eps": 0.1, "margins": [4.0] * 98 + [3.0]}, "refuted": None})
        >>> small["certified"]["margins"]["of"], list(small["certified"]["margins"]["smallest"].items())[:2]
        (99, [('98', 3.0), ('0', 4.0)])
        >>> bounds_claim(small, {"norm": "linf", "precision": "float64"}, rule="ibp").radius
        0.1
    """
    logits = evidence["logits"]
    if isinstance(logits, Mapping) or len(logits) <= _MANY:
        return evidence
    order = sorted(range(len(logits)), key=lambda one: -logits[one])
    others = [one for one in range(len(logits)) if one != order[0]]

    def entry(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        pairs = zip(others, found["margins"], strict=True)
        least = sorted(pairs, key=lambda pair: -math.inf if pair[1] is None else pair[1])[:_KEPT]
        return {**found, "margins": {"of": len(others), "smallest": {str(one): margin for one, margin in least}}}

    top = {str(one): logits[one] for one in order[:_KEPT]}
    kept = {"classes": len(logits), "largest": max(abs(value) for value in logits), "top": top}
    return {**evidence, "logits": kept, "certified": entry(evidence["certified"]), "refuted": entry(evidence["refuted"])}


def _prediction(logits: Logits) -> int:
    if isinstance(logits, Mapping):
        return min((-value, int(one)) for one, value in logits["top"].items())[1]
    return logits.index(max(logits))


def is_certified(margins: Margins, logits: Logits, dtype: str) -> bool:
    """Whether every margin exceeds the slack.

    Args:
        margins: lower bounds, or the smallest of them; None where a bound is not a number.
        logits: of the clean input; they set the scale of the slack.
        dtype: ``"float64"`` or ``"float32"``, which the bounds were computed in.

    Example:
        >>> is_certified([0.1, 2.0], [3.0, 1.0, 0.0], "float64"), is_certified([0.1, None], [3.0, 1.0, 0.0], "float64")
        (True, False)
        >>> is_certified([0.0, 2.0], [3.0, 3.0, 0.0], "float64")
        False
    """
    largest = logits["largest"] if isinstance(logits, Mapping) else max(abs(value) for value in logits)
    slack = SLACK[dtype] * (1.0 + largest)
    if isinstance(margins, Mapping):
        margins = list(margins["smallest"].values()) or [None]
    return all(margin is not None and margin > slack for margin in margins)


def bounds_claim(
    evidence: Evidence,
    parameters: Mapping[str, Any],
    *,
    rule: str,
    guarantee: Guarantee = Guarantee.DETERMINISTIC,
    dtype: str = "",
) -> Claim:
    """The largest eps in the evidence at which every margin is positive.

    Args:
        evidence: see the module.
        parameters: of the certifier: ``norm`` and ``precision``, which records of earlier releases call ``dtype``; with ``clip``
            the claim says that it is of the cut ball.
        rule: what the bounds rest on.
        guarantee: of the bounds.
        dtype: which the bounds were computed in, when it is not the parameter.

    Returns:
        The claim; radius 0.0 with the clean prediction when nothing is certified, which is true of any classifier.

    Example:
        >>> refuted = {"eps": 0.26, "margins": [-0.1]}
        >>> evidence = {"logits": [3.0, 1.0], "certified": {"eps": 0.25, "margins": [0.5]}, "refuted": refuted}
        >>> claim = bounds_claim(evidence, {"norm": "linf", "precision": "float64"}, rule="ibp")
        >>> claim.prediction, claim.radius, str(claim.guarantee)
        (0, 0.25, 'deterministic')
    """
    logits, dtype = evidence["logits"], dtype or parameters.get("precision") or parameters["dtype"]
    found = [entry for entry in (evidence["certified"], evidence["refuted"]) if entry is not None]
    outward = evidence.get("rounding") == OUTWARD
    rounded, promised = (", rounded outward,", ", their rounding included") if outward else ("", "")
    radius = max((entry["eps"] for entry in found if is_certified(entry["margins"], logits, dtype)), default=0.0)
    return Claim(
        prediction=_prediction(logits),
        radius=float(radius),
        guarantee=guarantee,
        norm=Norm(parameters["norm"]),
        alpha=None,
        rule=rule,
        assumptions=(
            ASSUMPTION.format(dtype=dtype, slack=SLACK[dtype], rounded=rounded),
            *((CLIPPED,) if parameters.get("clip") else ()),
            *(OPERATORS.format(operators=each, rounded=promised) for each in evidence.get("operators", ())),
        ),
    )


def ibp(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """Interval bound propagation: Gowal et al. (ICCV 2019), with the last layer merged into the margins."""
    return bounds_claim(evidence, parameters, rule="ibp/gowal-2019")


def crown_ibp(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """CROWN margins over intermediate interval bounds: Zhang et al. (ICLR 2020)."""
    return bounds_claim(evidence, parameters, rule="crown-ibp/zhang-2020")


def crown(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """Linear relaxation backwards through the network: Zhang et al. (NeurIPS 2018); Xu et al. (NeurIPS 2020)."""
    return bounds_claim(evidence, parameters, rule="crown/zhang-2018")


def alpha_crown(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """CROWN with optimised slopes: Xu et al. (ICLR 2021). Release 0.3 returns float32, so that slack applies."""
    return bounds_claim(evidence, parameters, rule="alpha-crown/xu-2021", dtype="float32")


def sound_etb(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """Expected tight bounds plus the correction of the unstable neurons, intersected with interval bounds."""
    return bounds_claim(evidence, parameters, rule=f"sound-etb ({parameters.get('slope', 'chord')})")


def etb(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """Expected tight bounds: Alsubaihi et al. (arXiv 1905.12418). Not sound: an estimate, never a certificate."""
    rule = f"etb/alsubaihi-2021 ({parameters.get('variant', 'blocks')})"
    return bounds_claim(evidence, parameters, rule=rule, guarantee=Guarantee.ESTIMATE)
