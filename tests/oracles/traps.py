"""The traps of the grammar: what Python can do that a trace does not show, or that a rule may forget.

Each kind writes lines of ``forward`` and, where a batch would be treated differently from its rows, other lines for the honest
twin. ``seen.append`` hands the oracle the number that a trap looks at, by row, so that it can drive images over the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.oracles.grammar import Builder


@dataclass(frozen=True)
class Trap:
    """A kind of trap: where it may stand (``"image"``, ``"vector"``, ``"logits"``; "" is anywhere) and what writes it."""

    phase: str
    write: Callable[[Builder], None]


TABLE: dict[str, Trap] = {}


def trap(kind: str, phase: str = "") -> Callable[[Callable[[Builder], None]], Callable[[Builder], None]]:
    """Enter a function in the table."""

    def enter(write: Callable[[Builder], None]) -> Callable[[Builder], None]:
        TABLE[kind] = Trap(phase, write)
        return write

    return enter
