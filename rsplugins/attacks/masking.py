"""What attacks side by side say of a model, and of themselves: signs of gradient masking. No torch.

EMPIRICAL: an attack that fails proves nothing. None of these numbers may stand beside certified ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsplugins.certificate import Guarantee

GAP = 0.05
"""A difference between attacks above this, and beyond the sampling error, is flagged as likely gradient masking."""
SIGNIFICANCE = 0.01
"""Largest p-value of the paired test at which a difference is beyond the sampling error."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of the attacked inputs that are still classified correctly. EMPIRICAL.

    Attributes:
        images: how many inputs.
        clean: without an attack.
        pgd: under PGD on the cross-entropy.
        scaled: under the same PGD with the logits multiplied, by factor.
        margin: under the same PGD on the margin, which no factor changes.
        autoattack: under AutoAttack, or None when it was left out.
        flags: what looks like gradient masking, in words.
        notes: differences of that size that these inputs are too few to tell from chance, in words.
    """

    images: int
    clean: float
    pgd: float
    scaled: Mapping[str, float]
    margin: float
    autoattack: float | None
    flags: Sequence[str]
    guarantee: str = str(Guarantee.EMPIRICAL)
    notes: Sequence[str] = field(default_factory=list)


def summarise(survived: Sequence[Mapping[str, bool]], steps: int) -> Accuracy:
    """Return the accuracies over attacked inputs, and what they say about gradient masking.

    Args:
        survived: of each input, by attack, whether its class was still the true one; ``"clean"``, ``"pgd"``, ``"margin"``,
            ``"pgd xFACTOR"``, and ``"autoattack"`` where it ran.
        steps: of PGD.
    """
    names = list(survived[0]) if survived else []

    def share(name: str) -> float:
        return sum(bool(row[name]) for row in survived) / max(1, len(survived))

    scaled = {name.removeprefix("pgd x"): share(name) for name in names if name.startswith("pgd x")}
    pgd, margin = share("pgd"), share("margin")
    flags: list[str] = []
    notes: list[str] = []

    def judge(lower: str, comparisons: int, text: str) -> None:
        gap = pgd - share(lower)
        if gap <= GAP:
            return
        chance = min(1.0, comparisons * paired_p_value(survived, "pgd", lower))
        seen, counted = text.format(100 * gap), f"({round(gap * len(survived))} of {len(survived)} inputs, p = {chance:.2g})"
        if chance <= SIGNIFICANCE:
            flags.append(f"{seen}: likely gradient masking {counted}")
        else:
            notes.append(f"{seen}: too few inputs to tell that from chance {counted}; attack more")

    auto = share("autoattack") if "autoattack" in names else None
    if auto is not None:
        judge("autoattack", 1, f"AutoAttack is {{:.1f}} points below PGD-{steps}")
    rescaled = ["margin", *(f"pgd x{factor}" for factor in scaled)]
    judge(min(rescaled, key=share), len(rescaled), "PGD falls by {:.1f} points when the logits are rescaled")
    return Accuracy(len(survived), share("clean"), pgd, scaled, margin, auto, flags, notes=notes)


def paired_p_value(rows: Sequence[Mapping[str, Any]], weaker: str, stronger: str) -> float:
    """Return McNemar's exact one-sided p-value: how probable such a lead of one attack is, were both equally strong.

    Both saw the same inputs, so only those that fell to one of the two count; each is then as probably the one's as the other's.

    Example:
        >>> rows = [{"pgd": True, "autoattack": False}] * 4 + [{"pgd": True, "autoattack": True}] * 46
        >>> paired_p_value(rows, "pgd", "autoattack")
        0.0625
    """
    only_stronger = sum(bool(row[weaker]) and not row[stronger] for row in rows)
    only_weaker = sum(bool(row[stronger]) and not row[weaker] for row in rows)
    n = only_stronger + only_weaker
    return float(sum(math.comb(n, k) for k in range(only_stronger, n + 1)) / 2**n)
