r"""Enclosures of tensors, and how a linear bound of one becomes a linear bound of those it was computed from.

A :class:`Value` is an interval [low, high], elementwise, that contains what a node of the network can be. Each operation widens
its interval by a bound of its own rounding error, so the intervals hold whatever the rounding; by induction so do the last ones.

For CROWN (Zhang et al., NeurIPS 2018) an operation also says how rows A of a lower bound :math:`A y + b` of it are carried to
its arguments x: rows :math:`A_x` and numbers :math:`\beta` with :math:`A y \ge A_x x + \beta` on the interval. Linear operations
do so exactly; elementwise ones by two lines; a product of two uncertain values by its tangent at their centres, whose remainder
is at most the product of their radii; any other by its interval. Carrying rounds too: an output made of n products is off by at
most :math:`\gamma_n |A| m` with m the magnitude that the operation itself computed, which is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count as counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rsplugins import arithmetic

_numbers = counter()

ROUNDINGS = 24
"""Of one operation besides its sum: centre and radius, their sums, the bound's own computation, the weights' conversion."""

ULPS = 16
"""Of an elementary function; the libraries' own are within 1 or 2 units in the last place."""

Function: TypeAlias = Callable[..., Tensor]

_plain = ContextVar("plain", default=False)


@contextmanager
def as_they_come() -> Iterator[None]:
    """Leave intervals and rows as floating point gives them: only to tell rounding from a wrong rule."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Return whether this is within :func:`as_they_come`."""
    return _plain.get()


def growth(count: int, dtype: torch.dtype) -> float:
    """Return :func:`rsplugins.arithmetic.growth`, or 0 within :func:`as_they_come`."""
    return 0.0 if _plain.get() else arithmetic.growth(count, dtype)


def rounding_error(count: int, magnitude: Tensor) -> Tensor:
    """Return :func:`rsplugins.arithmetic.rounding_error`, or 0 within :func:`as_they_come`."""
    return torch.zeros_like(magnitude) if _plain.get() else arithmetic.rounding_error(count, magnitude)


class Carried(NamedTuple):
    """What rows (S, ...) of a lower bound become.

    Attributes:
        rows: for each argument.
        number: (S,), that the bound keeps.
    """

    rows: list[Tensor]
    number: Tensor


Carry: TypeAlias = Callable[[Tensor], Carried]


@dataclass(eq=False)
class Value:
    """What a node of a network can be.

    Attributes:
        low: any shape.
        high: of the same shape.
        parents: what it was computed from; empty for the input, and for what does not depend on it.
        carry: see the module; None: by its interval.
        affine: whether nothing is lost by carrying.
        chords: another way of carrying, by two lines along the chord.
        number: values that are computed later have a larger one.
    """

    low: Tensor
    high: Tensor
    parents: tuple[Value, ...] = ()
    carry: Carry | None = None
    affine: bool = False
    chords: Carry | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def center(self) -> Tensor:
        """The middle, rounded."""
        return 0.5 * self.low + 0.5 * self.high

    @property
    def radius(self) -> Tensor:
        """Half of the width, rounded."""
        return 0.5 * self.high - 0.5 * self.low

    @property
    def size(self) -> Tensor:
        """The largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def is_point(self) -> bool:
        """Whether it is known exactly."""
        return self.low is self.high


def point(tensor: Tensor) -> Value:
    """Return a tensor that is known exactly."""
    return Value(tensor, tensor)


def enclosed(low: Tensor, high: Tensor, off: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return an interval widened by ``off``; what is no number becomes unbounded."""
    return torch.nan_to_num(low - off, nan=-math.inf, posinf=math.inf, neginf=-math.inf), torch.nan_to_num(
        high + off, nan=math.inf, posinf=math.inf, neginf=-math.inf
    )


def transposed(function: Function, at: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Return rows (S, ...) times the derivative of a function at a point, for each argument."""
    with torch.enable_grad():
        pull: Any = torch.func.vjp(function, *at)[1]
        found = torch.vmap(pull)(rows)
    return list(found)


def against(rows: Tensor, values: Tensor) -> Tensor:
    """Return the sum of rows (S, ...) times values (...), (S,)."""
    found: Tensor = rows.reshape(len(rows), -1) @ values.flatten()
    return found


def lost(rows: Tensor, terms: int, magnitude: Tensor) -> Tensor:
    """Return what carrying rows through a sum of so many products may be off by, (S,)."""
    total = against(rows.abs(), magnitude)
    return rounding_error(terms + ROUNDINGS, total) * (1 + growth(magnitude.numel(), magnitude.dtype))


def constant_part(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the least of rows times anything in an interval, (S,), rounded down."""
    up, down = rows.clamp(min=0), rows.clamp(max=0)
    # 0 times an unbounded end is 0.
    finite_low, finite_high = (torch.where(torch.isfinite(end), end, torch.zeros_like(end)) for end in (low, high))
    total = against(up, finite_low) + against(down, finite_high)
    open_low, open_high = ((~torch.isfinite(end)).to(rows) for end in (low, high))
    open_ = (against(up, open_low) - against(down, open_high)) > 0
    size = torch.maximum(low.abs(), high.abs())
    size = torch.where(torch.isfinite(size), size, torch.zeros_like(size))
    total = total - rounding_error(size.numel() + ROUNDINGS, against(rows.abs(), size))
    return torch.where(open_, torch.full_like(total, -math.inf), total)


def moved(function: Function, value: Value) -> Value:
    """Return what an operation does that only moves, repeats or drops values."""
    low, high = function(value.low), function(value.high)
    if value.is_point:
        return point(low)
    shape = torch.zeros_like(value.low)

    def carry(rows: Tensor) -> Carried:
        found = transposed(function, [shape], rows)
        uses = int(transposed(function, [shape], torch.ones_like(rows[:1]))[0].max()) if found[0].numel() else 0
        if uses <= 1:  # nothing is added up
            return Carried(found, rows.new_zeros(len(rows)))
        return Carried(found, -lost(rows, uses, function(value.size)))

    return Value(low, high, (value,), carry, affine=True)


def averaged(function: Function, value: Value, terms: int) -> Value:
    """Return a sum with weights of at least 0, such as a mean, of so many terms."""
    magnitude = function(value.size)
    low, high = enclosed(function(value.low), function(value.high), rounding_error(terms + ROUNDINGS, magnitude))
    shape = torch.zeros_like(value.low)

    def carry(rows: Tensor) -> Carried:
        return Carried(transposed(function, [shape], rows), -lost(rows, terms, magnitude))

    return Value(low, high, (value,), carry, affine=True)


def product(function: Function, one: Value, two: Value, terms: int) -> Value:
    """Return what a bilinear function makes of two values: a matrix product, a convolution with weights.

    Args:
        function: (x, y) -> z, a sum of products of an x and a y.
        one: x.
        two: y.
        terms: products in one output, and outputs that one input takes part in, at most.
    """
    magnitude = function(one.size, two.size)
    if one.is_point:
        return _half(lambda y: function(one.low, y), lambda y: function(one.low.abs(), y), two, magnitude, terms)
    if two.is_point:
        return _half(lambda x: function(x, two.low), lambda x: function(x, two.low.abs()), one, magnitude, terms)
    center, rest = function(one.center, two.center), function(one.radius, two.radius)
    radius = function(one.radius, two.center.abs()) + function(one.center.abs(), two.radius) + rest
    magnitude = 4 * magnitude
    low, high = enclosed(center - radius, center + radius, rounding_error(terms + ROUNDINGS, magnitude))
    at = [one.center, two.center]

    def carry(rows: Tensor) -> Carried:
        number = -against(rows, center) - against(rows.abs(), rest)
        return Carried(transposed(function, at, rows), number - lost(rows, terms + rest.numel(), magnitude))

    return Value(low, high, (one, two), carry)


def _half(function: Function, absolute: Function, value: Value, magnitude: Tensor, terms: int) -> Value:
    center, radius = function(value.center), absolute(value.radius)
    low, high = enclosed(center - radius, center + radius, rounding_error(terms + ROUNDINGS, magnitude))
    shape = torch.zeros_like(value.low)

    def carry(rows: Tensor) -> Carried:
        return Carried(transposed(function, [shape], rows), -lost(rows, terms, magnitude))

    return Value(low, high, (value,), carry, affine=True)


def added(one: Value, two: Value, sign: int = 1) -> Value:
    """Return one + two, or one - two."""
    first, second = (two.low, two.high) if sign > 0 else (-two.high, -two.low)
    magnitude = one.size + two.size
    low, high = enclosed(one.low + first, one.high + second, rounding_error(2, magnitude))
    shapes = [torch.zeros_like(one.low), torch.zeros_like(two.low)]

    def function(x: Tensor, y: Tensor) -> Tensor:
        return x + sign * y

    def carry(rows: Tensor) -> Carried:
        return Carried(transposed(function, shapes, rows), -lost(rows, max(_repeats(rows, each) for each in shapes), magnitude))

    return Value(low, high, (one, two), carry, affine=True)


def _repeats(rows: Tensor, shape: Tensor) -> int:
    return 1 + rows[0].numel() // max(shape.numel(), 1)


def multiplied(one: Value, two: Value) -> Value:
    """Return the elementwise product."""
    outputs = (one.low * two.low).numel()
    found = product(torch.mul, one, two, 1 + outputs // max(min(one.low.numel(), two.low.numel()), 1))
    corners = [a * b for a in (one.low, one.high) for b in (two.low, two.high)]
    # 0 times an unbounded end is 0, and a product of two numbers that are one another's multiples is no smaller than 0.
    corners = [torch.nan_to_num(c, nan=0.0, posinf=math.inf, neginf=-math.inf) for c in corners]
    low, high = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    if one is two:
        low = torch.where((one.low <= 0) & (one.high >= 0), torch.zeros_like(low), low)
    off = rounding_error(4, one.size * two.size)
    found.low, found.high = enclosed(low, high, torch.nan_to_num(off, nan=math.inf))
    return found


def bounded_by(low: Tensor, high: Tensor, *parents: Value) -> Value:
    """Return a value of which only its interval is known."""
    low, high = enclosed(low, high)
    return Value(low, high, parents)


def lines(low: Tensor, high: Tensor, value: Value, below: tuple[Tensor, Tensor], above: tuple[Tensor, Tensor]) -> Value:
    """Return an elementwise function that lies between two lines.

    Args:
        low: of the result.
        high: of the result.
        value: the argument.
        below: slope and height of the line below, rounded down.
        above: slope and height of the line above, rounded up.
    """
    size, heights = value.size, torch.maximum(below[1].abs(), above[1].abs())
    magnitude = torch.maximum(below[0].abs(), above[0].abs()) * size

    def carry(rows: Tensor) -> Carried:
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        number = (
            against(up, below[1])
            + against(down, above[1])
            - rounding_error(heights.numel() + ROUNDINGS, against(rows.abs(), heights))
        )
        return Carried([up * below[0] + down * above[0]], number - lost(rows, 2, magnitude))

    return Value(low, high, (value,), carry)


@dataclass(frozen=True)
class Ball:
    """Points around one, in a norm, and within a box around it.

    Attributes:
        entry: the network's input, whose interval is the box.
        center: the point.
        radius: in the norm.
        dual: order of the dual norm: inf for l1, 2 for l2; 1 where the box is all.
    """

    entry: Value
    center: Tensor
    radius: float
    dual: float


def lower_bounds(
    value: Value, rows: Tensor, ball: Ball | None = None, *, bends: float = math.inf, chords: bool = False
) -> Tensor:
    """Return lower bounds of rows (S, ...) times a value, (S,), by carrying them back to what it was computed from.

    Args:
        value: the output.
        rows: what is bounded.
        ball: in which the input lies besides its interval.
        bends: operations where carrying loses something that a path may pass; at the next one their interval is taken.
        chords: whether elementwise functions lie between lines along their chord.
    """
    waiting: dict[tuple[int, float], _Rows] = {(value.number, bends): _Rows(value, rows)}
    total, sizes, off = (rows.new_zeros(len(rows)) for _ in range(3))
    numbers = 0
    while waiting:
        key = max(waiting)
        node, at, added_up, magnitude = waiting.pop(key)
        left = key[1] if node.affine else key[1] - 1
        carry = node.chords if chords and node.chords is not None else node.carry
        if magnitude is not None:
            off = off + lost(magnitude, added_up, node.size)
        if carry is None or left < 0:
            number = constant_part(at, node.low, node.high)
            if ball is not None and node is ball.entry:
                number = torch.maximum(number, _in_ball(at, ball))
            carried = Carried([], number)
        else:
            carried = carry(at)
        total, sizes, numbers = total + carried.number, sizes + carried.number.abs(), numbers + 1
        for parent, own in zip(node.parents, carried.rows, strict=False):
            before = waiting.get((parent.number, left))
            if before is None:
                waiting[parent.number, left] = _Rows(parent, own)
            else:
                magnitude = (before.rows.abs() if before.magnitude is None else before.magnitude) + own.abs()
                waiting[parent.number, left] = _Rows(parent, before.rows + own, before.added_up + 1, magnitude)
    off = off + growth(numbers + ROUNDINGS, total.dtype) * (sizes + off)
    found: Tensor = torch.nan_to_num(total - off, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    return found


class _Rows(NamedTuple):
    node: Value
    rows: Tensor
    added_up: int = 1
    magnitude: Tensor | None = None  # of all that was added up, where there were several consumers


def _in_ball(rows: Tensor, ball: Ball) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), ord=ball.dual, dim=1)
    found = against(rows, ball.center) - ball.radius * norms
    magnitude = against(rows.abs(), ball.center.abs() + ball.radius)
    return torch.sub(found, rounding_error(ball.center.numel() + ROUNDINGS, magnitude))
