"""The book-keeping of one input while it is being sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsplugins.certificate import Evidence, Gathered
from rsplugins.sampling.program import Program, Tally


class Slot:
    """One input at work: its program, the draw it waits for, and what came in so far.

    Attributes:
        index: of the input.
        image: on the device, in the layout of the buffer.
        counts, sums, squares: of the current draw, shape (K,).
        next, stop: samples of the current draw that were not launched yet.
        outstanding: samples of the current draw whose result is not booked yet.
        evidence: what the program returned, once it has.
    """

    def __init__(self, index: int, image: Tensor, program: Program, num_classes: int, *, scores: bool) -> None:
        self.index, self.image, self._program = index, image, program
        self._width, self._scores = num_classes, scores
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.sums: NDArray[np.float64] = np.zeros(0)
        self.squares: NDArray[np.float64] = np.zeros(0)
        self.next = self.stop = self.outstanding = self._total = self.samples = 0
        self.seconds = 0.0
        self.evidence: Evidence | None = None
        self._advance(None)

    @property
    def unlaunched(self) -> int:
        """Samples of the current draw that no micro-batch holds yet."""
        return self.stop - self.next

    def proceed(self) -> None:
        """Hand finished draws to the program, until it waits for samples again or ends."""
        while self.evidence is None and self.outstanding == 0:
            tally = Tally(self._total, self.counts, self.sums, self.squares)
            self.samples += self._total
            self._advance(tally)

    def _advance(self, tally: Tally | None) -> None:
        try:
            draw = next(self._program) if tally is None else self._program.send(tally)
        except StopIteration as end:
            self.evidence = {} if end.value is None else end.value
            return
        self.next, self.stop = draw.start, draw.stop
        self.outstanding = self._total = len(draw)
        if self._scores:
            self.sums, self.squares = np.zeros(self._width), np.zeros(self._width)
        else:
            self.counts = np.zeros(self._width, np.int64)

    def gathered(self) -> Gathered:
        """Return the result; only once ``evidence`` is there."""
        assert self.evidence is not None
        return Gathered(self.index, self.evidence, self.samples, self.seconds)


class Segment(NamedTuple):
    """Rows of a micro-batch that belong to one slot: samples ``start`` to ``start + rows - 1``."""

    slot: Slot
    start: int
    rows: int


@dataclass
class Clock:
    """Shares wall-clock time among the inputs of each micro-batch.

    Attributes:
        spent: seconds not charged to anybody yet.
    """

    spent: float = field(default=0.0)

    def charge(self, segments: list[Segment]) -> None:
        """Charge what was spent to the owners of these rows, by number of rows."""
        rows = sum(segment.rows for segment in segments)
        for segment in segments:
            segment.slot.seconds += self.spent * segment.rows / rows
        self.spent = 0.0
