"""Bounds of elementwise functions that auto-LiRPA 0.3 lacks; where the release has its own, those are taken."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from rsplugins.compat import bridge_auto_lirpa

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import BoundActivation  # noqa: E402


class Monotone(BoundActivation, ABC):  # type: ignore[misc]  # auto-LiRPA has no types
    """A function that does not fall: an interval's ends go to the ends of its image.

    Linear bounds are two lines a neuron, from :meth:`lines`; see there. Rounding is what any elementwise operator from outside
    auto-LiRPA is given, see :mod:`rsplugins.lirpa.outward`.
    """

    def interval_propagate(self, *intervals: Any) -> tuple[Tensor, Tensor]:
        """Return the image of an interval."""
        low, high = intervals[0]
        rest = [interval[0] for interval in intervals[1:]]
        return self.forward(low, *rest), self.forward(high, *rest)

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, *constants: Any) -> Any:
        """Put the lines in the place of the function; constants take no part."""
        self.init_linear_relaxation(x)
        ends = [constant.forward_value for constant in constants]
        (self.lw, self.lb), (self.uw, self.ub) = self.lines(x.lower, x.upper, *ends)
        self.relaxed = True
        try:
            found, low, high = super().bound_backward(last_lA, last_uA, x)
        finally:
            self.relaxed = False
        return [*found, *((None, None) for _ in constants)], low, high

    @abstractmethod
    def lines(self, low: Tensor, high: Tensor, *ends: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return slope and offset of a line below the function on [low, high], and of one above it."""


class BoundErf(Monotone):
    """The error function, of which GELU is made.

    With k the smaller of the slopes at the ends: the slope rises up to 0 and falls behind it, so it is at least k in between, and
    f(x) - k x does not fall. So f(l) + k (x - l) lies below f, and f(u) + k (x - u) above it. The same holds for any smaller k,
    and k is rounded down.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return erf(x)."""
        return torch.erf(x)

    def lines(self, low: Tensor, high: Tensor, *ends: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """See the class."""
        farthest = torch.maximum(low.abs(), high.abs())
        slope = 2 / math.sqrt(math.pi) * torch.exp(-farthest.square()) * (1 - 64 * torch.finfo(low.dtype).eps)
        # The square's rounding is relative to an exponent, so far out the slope is taken for 0.
        slope = torch.where(farthest > 5, torch.zeros_like(slope), slope)
        return (slope, torch.erf(low) - slope * low), (slope, torch.erf(high) - slope * high)


class BoundClip(Monotone):
    r"""min(max(x, a), b), of ReLU6 and Hardtanh.

    Where only a lies within (l, u) the function is max(x, a), convex: the chord is above it; x and a are below it. Where only b
    does, it is min(x, b), concave: the other way round. Where both do, the line from (l, a) to (b, b) is the chord of max(x, a)
    up to b and rises behind it, so it is above; that from (a, a) to (u, b) is below.
    """

    def __init__(self, attr: Any, inputs: Any, output_index: Any, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        # The exporter writes the range as inputs or as attributes, by which of its modules are loaded.
        self.range = tuple((attr or {}).get(name) for name in ("min", "max"))

    def forward(self, x: Tensor, *ends: Tensor) -> Tensor:
        """Return x cut to a range."""
        low, high = self._ends(x, *ends)
        return torch.clamp(x, low, high)

    def _ends(self, x: Tensor, *ends: Tensor) -> tuple[Tensor, Tensor]:
        given = [*ends, None, None][:2]
        found = []
        for end, number, none in zip(given, self.range, (-math.inf, math.inf), strict=True):
            number = none if number is None else float(number)
            found.append(torch.tensor(number, dtype=x.dtype, device=x.device) if end is None else end.to(x))
        return found[0], found[1]

    def lines(self, low: Tensor, high: Tensor, *ends: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """See the class."""
        first, last = (end.expand_as(low) for end in self._ends(low, *ends))
        return _ramp(low, high, first, last)


class BoundHardSigmoid(Monotone):
    """min(max(a x + b, 0), 1) with a > 0: the lines of the clip, in a x + b."""

    def __init__(self, attr: Any, inputs: Any, output_index: Any, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.scale, self.shift = float((attr or {}).get("alpha", 0.2)), float((attr or {}).get("beta", 0.5))
        # The exporter writes float32 numbers: a sixth has to be the sixth that torch computes with.
        if abs(self.scale - 1 / 6) < 1e-7:
            self.scale = 1 / 6
        if self.scale <= 0:
            raise NotImplementedError("a hard sigmoid that falls")

    def forward(self, x: Tensor) -> Tensor:
        """Return the ramp."""
        return torch.clamp(x * self.scale + self.shift, 0, 1)

    def lines(self, low: Tensor, high: Tensor, *ends: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """See the class."""
        inner = [end * self.scale + self.shift for end in (low, high)]
        below, above = _ramp(inner[0], inner[1], torch.zeros_like(low), torch.ones_like(low))
        return tuple((slope * self.scale, slope * self.shift + offset) for slope, offset in (below, above))  # type: ignore[return-value]


def _ramp(low: Tensor, high: Tensor, first: Tensor, last: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the lines of min(max(x, first), last) on [low, high], as :class:`BoundClip` derives them."""
    enters, leaves = low < first, high > last
    outside = (high <= first) | (low >= last)
    zero, one = torch.zeros_like(low), torch.ones_like(low)
    at_low, at_high = low.clamp(first, last), high.clamp(first, last)
    # Above: through (low, f(low)), to the place where the ramp ends or the interval does.
    reach = torch.minimum(high, last)
    width = torch.where(outside | (reach <= low), one, reach - low)
    chord = torch.where(enters & ~outside, (reach - at_low) / width, one)
    flat_above = leaves & ~enters & (last - low < high - last)  # the smaller area
    slope_above = torch.where(outside | flat_above, zero, chord)
    offset_above = torch.where(outside, at_high, torch.where(flat_above, last, at_low - chord * low))
    # Below: through (high, f(high)).
    start = torch.maximum(low, first)
    width = torch.where(outside | (high <= start), one, high - start)
    chord = torch.where(leaves & ~outside, (at_high - start) / width, one)
    flat_below = enters & ~leaves & (high - first < first - low)
    slope_below = torch.where(outside | flat_below, zero, chord)
    offset_below = torch.where(outside, at_low, torch.where(flat_below, first, at_high - chord * high))
    return (slope_below, offset_below), (slope_above, offset_above)
