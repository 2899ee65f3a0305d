"""From the logits of a micro-batch to numbers by input: votes, or sums of scores.

A reader works in two steps, so that a GPU is never waited for: ``reduce`` runs on the device and returns one flat tensor, the
only thing that is transferred; ``settle`` books it on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsplugins.double import double
from rsplugins.errors import OutputValueError
from rsplugins.sampling.bookkeeping import Segment, Slot

SLACK = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""A gap between the two largest logits below this share of the largest magnitude in the row is decided in the canonical way."""

_SAFETY = 16.0

Sample = tuple[Slot, int]
"""A slot and the index of one of its samples."""


class Reader(Protocol):
    """Turns logits into bookings on slots."""

    num_classes: int

    def reduce(self, logits: Tensor, owners: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return one flat tensor on the device of ``logits``, (B, K); ``owners[b]`` is the position of row b's segment."""

    def settle(self, reduced: NDArray[np.float64], segments: Sequence[Segment]) -> None:
        """Book what ``reduce`` returned, now on the host."""


class ScoreReader:
    """Sums of scores and of their squares, in float64.

    Args:
        num_classes: K.
        softmax: whether the scores are the softmax of the logits, or what the function returns.
    """

    def __init__(self, num_classes: int, *, softmax: bool) -> None:
        self.num_classes, self.softmax = num_classes, softmax

    def reduce(self, logits: Tensor, owners: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return (S, 2 K) sums, flat; a NaN or infinite logit makes its segment's sums NaN."""
        wide = double(logits)
        scores = wide.softmax(1) if self.softmax else wide
        scores = scores.masked_fill(~wide.isfinite().all(1, keepdim=True), torch.nan)
        both = torch.cat([scores, scores.square()], dim=1)
        table = torch.zeros(len(segments), both.shape[1], dtype=torch.float64, device=wide.device)
        return table.index_add_(0, owners.to(wide.device), both).view(-1)

    def settle(self, reduced: NDArray[np.float64], segments: Sequence[Segment]) -> None:
        """Add the sums to the slots."""
        table = reduced.reshape(len(segments), 2, self.num_classes)
        for segment, (sums, squares) in zip(segments, table, strict=True):
            if not np.isfinite(sums).all():
                raise not_finite(segment.slot)
            segment.slot.sums += sums
            segment.slot.squares += squares
            segment.slot.outstanding -= segment.rows


class VoteReader:
    """Votes by class, the same whatever the batch size.

    Kernels round differently in batches of different size, by about 1e-6 of the logits' magnitude, which can flip a near-tie. So
    the classifier that is certified is the one that decides each sample in one *canonical* way (alone on a CPU; in 16 bits, and
    elsewhere, in a padded batch of fixed size), and a micro-batch is a shortcut that is trusted only where the gap between the
    two largest logits is clear. What is clear is measured on the first micro-batch: at least :data:`SLACK`, and 16 times the
    deviation seen there.

    Args:
        num_classes: K.
        canonical: from (slot, sample index) pairs to logits (rows, K), decided in the canonical way.
        capacity: rows of one canonical batch; unclear samples are collected until there are as many, or somebody waits for them.
    """

    def __init__(self, num_classes: int, canonical: Callable[[Sequence[Sample]], Tensor], capacity: int) -> None:
        self.num_classes, self.capacity = num_classes, capacity
        self.reevaluated = 0
        self.slack: float | None = None
        self._canonical = canonical
        self._pool: list[Sample] = []

    def reduce(self, logits: Tensor, owners: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return the (S, K) counts of clear votes, then one flag a row: 0 clear, 1 unclear, 2 not finite; int64, flat."""
        if self.slack is None:
            self.slack = self._measure_slack(logits, segments[0])
        width = self.num_classes
        logits = logits if logits.dtype == torch.float64 else logits.float()
        largest, winner = logits.topk(min(2, width), dim=1)
        gap = largest[:, 0] - largest[:, -1] if width > 1 else torch.full_like(largest[:, 0], torch.inf)
        flags = (gap <= self.slack * logits.abs().amax(1)).long()
        flags.masked_fill_(~logits.isfinite().all(1), 2)
        counts = torch.zeros(len(segments) * width, dtype=torch.int64, device=logits.device)
        counts.scatter_add_(0, owners * width + winner[:, 0], (flags == 0).long())
        return torch.cat([counts, flags])

    def settle(self, reduced: NDArray[np.float64], segments: Sequence[Segment]) -> None:
        """Add the counts to the slots, and decide the unclear samples."""
        cells = len(segments) * self.num_classes
        flags = reduced[cells:]
        row = 0
        for segment, counts in zip(segments, reduced[:cells].reshape(len(segments), -1), strict=True):
            mine = flags[row : row + segment.rows]
            row += segment.rows
            if mine.any():
                if (mine == 2).any():
                    raise not_finite(segment.slot)
                self._pool.extend((segment.slot, segment.start + int(at)) for at in np.flatnonzero(mine))
            segment.slot.counts += counts.astype(np.int64)
            segment.slot.outstanding -= segment.rows - int(np.count_nonzero(mine))
        waits = any(slot.unlaunched == 0 for slot, _ in self._pool)
        while len(self._pool) >= self.capacity or (waits and self._pool):
            samples, self._pool = self._pool[: self.capacity], self._pool[self.capacity :]
            self._decide(samples)

    def _decide(self, samples: Sequence[Sample]) -> None:
        logits = self._canonical(samples).cpu().double().numpy()
        for (slot, _), values in zip(samples, logits, strict=True):
            if not np.isfinite(values).all():
                raise not_finite(slot)
            slot.counts[int(values.argmax())] += 1  # the first of exact ties
            slot.outstanding -= 1
        self.reevaluated += len(samples)

    def _measure_slack(self, logits: Tensor, segment: Segment) -> float:
        rows = min(segment.rows, 4)
        expected = self._canonical([(segment.slot, segment.start + row) for row in range(rows)]).cpu().double()
        deviation = float((logits[:rows].cpu().double() - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30))
        return max(SLACK.get(logits.dtype, 2e-2), _SAFETY * deviation if math.isfinite(deviation) else 0.0)


def not_finite(slot: Slot) -> OutputValueError:
    """Return the error for an input whose logits are NaN or infinite."""
    return OutputValueError(
        f"The model returned logits that are not finite for noisy samples of input {slot.index}.",
        cause="weights that are not finite, an overflow in reduced precision, or a layer undefined for values outside [0, 1].",
        fix="Run the model on that input plus noise; in bfloat16, try dtype float32.",
    )
