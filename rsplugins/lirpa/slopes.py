"""When alpha-CROWN's slopes are good enough for an input: each stops for itself, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PATIENCE = 4
"""Iterations over which the smallest bound must have risen by a share of its rise before them."""
_SHARE = 0.02


class Progression:
    """The best lower bounds of each input while its slopes are optimised, frozen once it is decided.

    auto-LiRPA goes on until the whole batch is done, and keeps the best for each row; an input would then have other bounds in
    other company. Here an input is closed when all of its bounds are above ``enough``, when the smallest has stopped rising, or
    when it would not get there in the iterations that are left, rising as it did in the last few; what comes after that is not
    taken.

    Args:
        iterations: of all.
        enough: (B,), what the smallest bound of an input has to exceed.
    """

    def __init__(self, iterations: int, enough: Tensor) -> None:
        self._iterations, self._enough = iterations, enough
        self._best: Tensor | None = None
        self._closed = torch.zeros(len(enough), dtype=torch.bool, device=enough.device)
        self._smallest: list[Tensor] = []

    def __call__(self, lower: Tensor) -> Tensor:
        """Take the bounds (B, S) of one iteration; return which inputs are closed, (B, 1)."""
        found = lower.detach()
        if self._best is None:
            self._best = found.clone()
        better = (found > self._best) & ~self._closed[:, None]
        self._best = torch.where(better, found, self._best)
        self._smallest.append(self._best.amin(1))
        now = self._smallest[-1]
        self._closed |= now > self._enough
        if len(self._smallest) > _PATIENCE:
            first, before = self._smallest[0], self._smallest[-1 - _PATIENCE]
            self._closed |= now - before <= _SHARE * (before - first)
            left = self._iterations - len(self._smallest)
            self._closed |= now + left * (now - before) / _PATIENCE < self._enough
        return self._closed[:, None].clone()

    def tightened(self, lower: Tensor) -> Tensor:
        """Return the bounds to believe: those from while each input was open; what was returned, where no iteration was seen."""
        return lower if self._best is None else self._best.to(lower)


@contextmanager
def optimised(graph: Any, iterations: int, enough: Tensor | None) -> Iterator[Progression | None]:
    """Set how long a graph's slopes are optimised, within the context.

    Args:
        graph: of auto-LiRPA.
        iterations: at most.
        enough: (B,), for lower bounds alone; None when upper bounds are wanted too, which take all iterations.
    """
    options = graph.bound_opts["optimize_bound_args"]
    kept = dict(options)
    seen = None if enough is None else Progression(iterations, enough)
    options["iteration"] = iterations
    if seen is not None:
        options["stop_criterion_func"] = seen
    try:
        yield seen
    finally:
        options.clear()
        options.update(kept)
