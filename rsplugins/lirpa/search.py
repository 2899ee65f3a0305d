"""Margins' lower bounds in batches that fit the memory, and the largest eps at which all of them are positive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rsplugins.errors import warn
from rsplugins.lirpa.claims import compact, is_certified
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


class Bracket:
    """The largest certified eps of one input and the smallest refuted one, drawn together by a curve through the margins.

    What the smallest margin has lost at eps, of what it is without a ball, is close to a power of eps between two balls that
    are not far apart, for interval and for linear bounds. Each round asks beside the eps at which such a curve has lost
    everything: close by, so that a curve that is right ends the search, and further away, so that one that is not draws the
    ends together all the same. No answer is taken for granted: only what was certified counts.

    Args:
        margin: the smallest margin without a ball, by the logits.
        max_eps: no larger one is asked for.
        tolerance: how far apart the ends may stay.
        few: whether an answer costs so much that as few as possible are asked for, rather than a few at once.
    """

    def __init__(self, margin: float, max_eps: float, tolerance: float, *, few: bool = False) -> None:
        self.low, self.high, self._max, self._tolerance, self._few = 0.0, math.inf, max_eps, tolerance, few
        self._margin = margin
        # Of a grid, so that margins which differ by rounding, as in another batch, lead to the same questions.
        self._grid = max_eps * 2.0 ** -math.ceil(math.log2(max(max_eps / tolerance, 1)) + 6)
        self._points: dict[float, float] = {}
        """What the margin has lost at each eps that was asked for, as far as it is a number."""
        self._width = math.inf

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to ask."""
        return self.low >= self._max or self.high - self.low <= self._tolerance

    def trials(self) -> list[float]:
        """Return the next few eps to ask for, in order."""
        return sorted({round(eps / self._grid) * self._grid for eps in self._wanted()})

    def _wanted(self) -> list[float]:
        high = min(self.high, self._max)
        # From below: linear bounds cost the more the larger the ball, since more neurons are unstable in it.
        if self.low == 0 and high > 4 * self._tolerance:
            return [high / 64, high / 16]
        if self.high == math.inf and self.low == 0:
            return [high]
        if self.high == math.inf:
            root = self._root(*sorted(self._points)[-2:]) if len(self._points) > 1 else None
            reach = min(8 * self.low, high if root is None else 1.1 * root, high)
            return [high] if reach < 1.1 * self.low else [math.sqrt(self.low * reach), reach]
        slow, self._width = high - self.low > self._width / 4, high - self.low
        roots = self._roots()
        if not roots or (slow and self._few):
            return self._between([0.5] if self._few else [0.2, 0.4, 0.6, 0.8])
        near, apart = 0.45 * self._tolerance, abs(roots[0] - roots[-1])
        far = max(2 * near, 2 * apart, 0.25 * self._width if slow else 0.05 * self._width)
        sure, unsure = ((-near, near), (0.0,)) if self._few else ((-far, -near, near, far), (-far, 0.0, far))
        steps = unsure if apart > 4 * self._tolerance else sure
        return self._between([(roots[0] + step - self.low) / self._width for step in steps])

    def learn(self, eps: float, margin: float, certified: bool) -> None:
        """Take an answer: the smallest margin at eps, not a number where it has none."""
        if certified:
            self.low = max(self.low, eps)
        else:
            self.high = min(self.high, eps)
        lost = self._margin - margin
        if math.isfinite(lost) and lost > 0:
            self._points[eps] = lost

    def _between(self, shares: Sequence[float]) -> list[float]:
        """Return eps at shares of what lies between the ends; in the place of one outside, what halves the way to that end."""
        inside = [share for share in shares if 0 < share < 1]
        low, high = min(inside, default=1.0), max(inside, default=0.0)
        shares = [*inside, *([low / 2] if shares[0] <= 0 else []), *([(1 + high) / 2] if shares[-1] >= 1 else [])]
        return [self.low + share * self._width for share in shares]

    def _roots(self) -> list[float]:
        """Return where curves have lost the whole margin: of three points the best first, then of the two ends."""
        ends = [eps for eps in (self.low, self.high) if eps in self._points]
        if len(ends) < 2:
            return []
        straight = self._root(*ends)
        others = [eps for eps in self._points if eps not in ends]
        if straight is None or not others:
            return [] if straight is None else [straight]
        third = min(others, key=lambda eps: min(abs(math.log(eps / end)) for end in ends))
        curved = self._root(*ends, third)
        return [straight] if curved is None or not self.low < curved < self.high else [curved, straight]

    def _root(self, *points: float) -> float | None:
        """Return where log eps, as a line through two points over what was lost or a parabola through three, has lost all."""
        first, second, *third = points
        if self._margin <= 0:
            return None
        x0, x1 = math.log(first), math.log(second)
        y0, y1, goal = math.log(self._points[first]), math.log(self._points[second]), math.log(self._margin)
        if (y1 - y0) * (x1 - x0) <= 0:
            return None
        found = x0 + (goal - y0) * (x1 - x0) / (y1 - y0)
        for another in third:
            x2, y2 = math.log(another), math.log(self._points[another])
            if y2 in (y0, y1):
                return None
            bend = ((x2 - x1) / (y2 - y1) - (x1 - x0) / (y1 - y0)) / (y2 - y0)
            found += (goal - y0) * (goal - y1) * bend
        return math.exp(min(found, 700.0))


class Search:
    """For each input, a certified eps and one that could not be certified, at most ``tolerance`` apart.

    Args:
        margins: lower bounds of the margins.
        dtype: which they are computed in, ``"float64"`` or ``"float32"``.
        slack_dtype: which slack applies, when it is not that of ``dtype``.
        few: whether bounds cost so much that few are asked for at a time.
    """

    def __init__(self, margins: Margins, dtype: str, slack_dtype: str = "", *, few: bool = False) -> None:
        self.margins, self.dtype, self.slack_dtype, self.few = margins, dtype, slack_dtype or dtype, few

    def at(self, images: Tensor, logits: Tensor, eps: float) -> list[dict[str, Any]]:
        """Return the evidence of each input at one eps: certified or not."""
        found, specification = self._begun(logits)
        for i, _, entry, good in self._probe(images, specification, found, [(i, eps) for i in range(len(found))]):
            found[i]["certified" if good else "refuted"] = entry
        return [compact(evidence) for evidence in found]

    def largest(self, images: Tensor, logits: Tensor, max_eps: float, tolerance: float) -> list[dict[str, Any]]:
        """Return the evidence of each input between 0 and max_eps, the ends at most a tolerance apart; see :class:`Bracket`.

        What is certified at an eps holds whatever the method did at smaller ones, so no monotony is assumed. What one input is
        asked depends on its own margins alone.
        """
        found, specification = self._begun(logits)
        brackets = [Bracket(_lead(row["logits"]), max_eps, tolerance, few=self.few) for row in found]
        while active := [i for i, bracket in enumerate(brackets) if not bracket.is_done]:
            asked = [(i, eps) for i in active for eps in brackets[i].trials()]
            for i, eps, entry, good in self._probe(images, specification, found, asked):
                before = brackets[i].low, brackets[i].high
                brackets[i].learn(eps, _smallest(entry["margins"]), good)
                if (brackets[i].low, brackets[i].high) != before:
                    found[i]["certified" if good else "refuted"] = entry
        for evidence in found:  # not monotone: what was certified stands, whatever a smaller ball lacked
            if evidence["certified"] and evidence["refuted"] and evidence["refuted"]["eps"] < evidence["certified"]["eps"]:
                evidence["refuted"] = None
        return [compact(evidence) for evidence in found]

    def _begun(self, logits: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        values = logits.cpu().double().tolist()
        return [{"logits": row, "certified": None, "refuted": None} for row in values], margin_rows(
            logits.argmax(1), logits.shape[1]
        )

    def _probe(
        self, images: Tensor, specification: Tensor, found: list[dict[str, Any]], asked: list[tuple[int, float]]
    ) -> Iterator[tuple[int, float, dict[str, Any], bool]]:
        while asked:  # a batch at a time: the specification of a thousand classes is large
            part, asked = asked[: self.margins.batch], asked[self.margins.batch :]
            rows = [i for i, _ in part]
            tried = torch.tensor([eps * _INFLATION[self.dtype] for _, eps in part], dtype=torch.float64)
            lower = self.margins(images[rows], tried, specification[rows])
            for (i, eps), row in zip(part, lower.tolist(), strict=True):
                margins = [value if math.isfinite(value) else None for value in row]
                yield i, eps, {"eps": eps, "margins": margins}, is_certified(margins, found[i]["logits"], self.slack_dtype)


def _lead(logits: Sequence[float]) -> float:
    first, second, *_ = (*sorted(logits, reverse=True), -math.inf)
    return first - second


def _smallest(margins: Sequence[float | None]) -> float:
    known = [margin for margin in margins if margin is not None]
    return min(known, default=math.inf) if len(known) == len(margins) else math.nan
