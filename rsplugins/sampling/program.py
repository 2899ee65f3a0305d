"""What a program asks for (:class:`Draw`) and what it is given (:class:`Tally`)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsplugins.certificate import Evidence


@dataclass(frozen=True)
class Draw:
    """A request for the samples ``start`` to ``stop - 1`` of one input; the same index is always the same noise.

    Example:
        >>> len(Draw(100, 10_100))
        10000
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"{self}: expected 0 <= start <= stop")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Tally:
    """What the samples of one :class:`Draw` said.

    Attributes:
        total: number of samples.
        counts: shape (K,), int64: samples won by each class; empty when scores were tallied.
        sums: shape (K,), float64: sums of the scores by class; empty when votes were tallied.
        squares: shape (K,), float64: sums of their squares; empty when votes were tallied.

    Example:
        >>> Tally(3, counts=np.array([0, 2, 1])).votes()
        {'1': 2, '2': 1}
    """

    total: int
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def votes(self) -> dict[str, int]:
        """Return the counts that are not zero, as JSON values."""
        return {str(label): int(self.counts[label]) for label in np.flatnonzero(self.counts)}

    def scores(self) -> dict[str, Any]:
        """Return ``{"n": n, "sums": {class: sum}, "squares": {class: sum of squares}}`` without zeros, as JSON values."""
        sparse = [{str(label): float(values[label]) for label in np.flatnonzero(values)} for values in (self.sums, self.squares)]
        return {"n": self.total, "sums": sparse[0], "squares": sparse[1]}


Program = Generator[Draw, Tally, Evidence]
"""Asks for samples with ``tally = yield Draw(start, stop)`` as often as it likes, and returns the evidence."""
