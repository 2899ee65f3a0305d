"""Margins' lower bounds in batches that fit the memory, and the largest eps at which all of them are positive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsplugins.errors import warn
from rsplugins.lirpa.claims import is_certified
from rsplugins.machine.device import is_out_of_memory

MarginBounds = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (B, ...), eps (B,), specification (B, S, K)) -> lower bounds of specification @ logits, (B, S)."""

_INFLATION = {"float64": 1 + 1e-9, "float32": 1 + 1e-5}
"""Bounds are computed over a ball this much larger than the one claimed, so that its own rounding cannot make it smaller."""


def margin_rows(predictions: Tensor, classes: int) -> Tensor:
    """Return the specification of all margins: prediction minus every other class, the others in order.

    Args:
        predictions: (B,) class indices.
        classes: K.

    Returns:
        (B, K - 1, K), entries in {-1, 0, 1}.

    Example:
        >>> margin_rows(torch.tensor([1]), 3).tolist()
        [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]
    """
    identity = torch.eye(classes)
    others = torch.stack([identity[torch.arange(classes) != label] for label in predictions.tolist()])
    return identity[predictions.cpu()].unsqueeze(1) - others


class Margins:
    """Lower bounds of margins, over at most ``batch`` inputs and ``rows`` specification rows at a time.

    When memory runs out, the batch is halved and then the rows, each time with a warning, and the work goes on.

    Args:
        bounds: computes the bounds of one batch.
        batch: inputs at a time, at least 1.
        rows: specification rows at a time, at least 1.
    """

    def __init__(self, bounds: MarginBounds, batch: int = 16, rows: int = 128) -> None:
        self.bounds, self.batch, self.rows = bounds, batch, rows

    def __call__(self, images: Tensor, eps: Tensor, specification: Tensor) -> Tensor:
        """Return lower bounds (B, S), on the CPU in float64; NaN where a bound is not a number.

        Raises:
            RuntimeError: the device's own error, when one input and one row are too much.
        """
        found = torch.empty(specification.shape[:2], dtype=torch.float64)
        start = 0
        while start < len(images):
            rows = slice(start, start + self.batch)
            try:
                self._fill(found[rows], images[rows], eps[rows], specification[rows])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or (self.batch == 1 and self.rows == 1):
                    raise
                self._halve(min(self.batch, len(images)), min(self.rows, specification.shape[1]))
            else:
                start += self.batch
        return found

    def _fill(self, out: Tensor, images: Tensor, eps: Tensor, specification: Tensor) -> None:
        for first in range(0, specification.shape[1], self.rows):
            part = slice(first, first + self.rows)
            out[:, part] = self.bounds(images, eps, specification[:, part]).detach().cpu()

    def _halve(self, batch: int, rows: int) -> None:
        if batch > 1:
            self.batch, told = max(1, batch // 2), "inputs"
        else:
            self.batch, self.rows, told = 1, max(1, rows // 2), "specification rows"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = self.batch if told == "inputs" else self.rows
        warn(f"Out of memory: going on with {left} {told} at a time (bounds do not change).")


class Search:
    """For each input, a certified eps and one that could not be certified, at most ``tolerance`` apart.

    Args:
        margins: lower bounds of the margins.
        dtype: which they are computed in, ``"float64"`` or ``"float32"``.
        slack_dtype: which slack applies, when it is not that of ``dtype``.
    """

    def __init__(self, margins: Margins, dtype: str, slack_dtype: str = "") -> None:
        self.margins, self.dtype, self.slack_dtype = margins, dtype, slack_dtype or dtype

    def at(self, images: Tensor, logits: Tensor, eps: float) -> list[dict[str, Any]]:
        """Return the evidence of each input at one eps: certified or not."""
        return self._run(images, logits, [eps] * len(images), steps=0)

    def largest(self, images: Tensor, logits: Tensor, max_eps: float, tolerance: float) -> list[dict[str, Any]]:
        """Return the evidence of each input after bisection between 0 and max_eps.

        What is certified at an eps holds whatever the method did at smaller ones, so no monotony is assumed.
        """
        return self._run(images, logits, [max_eps] * len(images), max(0, math.ceil(math.log2(max_eps / tolerance))))

    def _run(self, images: Tensor, logits: Tensor, first: list[float], steps: int) -> list[dict[str, Any]]:
        values = logits.cpu().double().tolist()
        specification = margin_rows(logits.argmax(1), logits.shape[1])
        found: list[dict[str, Any]] = [{"logits": row, "certified": None, "refuted": None} for row in values]
        active, eps = list(range(len(values))), list(first)
        for _ in range(steps + 1):
            self._probe(images, specification, found, active, eps)
            # Certified at the first eps: done. Otherwise halve what is left.
            active = [i for i in active if found[i]["refuted"] is not None]
            if not active:
                break
            for i in active:
                low = found[i]["certified"]["eps"] if found[i]["certified"] else 0.0
                eps[i] = (low + found[i]["refuted"]["eps"]) / 2
        return found

    def _probe(
        self, images: Tensor, specification: Tensor, found: list[dict[str, Any]], active: list[int], eps: list[float]
    ) -> None:
        tried = torch.tensor([eps[i] * _INFLATION[self.dtype] for i in active], dtype=torch.float64)
        lower = self.margins(images[active], tried, specification[active])
        for i, row in zip(active, lower.tolist(), strict=True):
            margins = [value if math.isfinite(value) else None for value in row]
            good = is_certified(margins, found[i]["logits"], self.slack_dtype)
            found[i]["certified" if good else "refuted"] = {"eps": eps[i], "margins": margins}
