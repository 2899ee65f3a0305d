r"""Elementwise functions: their intervals, and two parallel lines around them.

On an interval each is monotone, or falls and then rises. Its lines have the slope s of its chord; how far
:math:`g(x) = f(x) - s x` goes on either side is read off a grid: on a cell of width h between two of its points g is nowhere
further than :math:`M h^2 / 8` outside of the values at its ends, with M a bound of :math:`|f''|` there (the error of linear
interpolation). Where f has corners they are points of the grid, so that no cell straddles one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.aten.values import ULPS, Carried, Value, against, bounded_by, enclosed, lines, lost, rounding_error, transposed

_CELLS = 8

_SOFTPLUS_JUMP = 3e-9
"""torch's softplus is x above 20, below its value at 20: at the jump it is not monotonic."""


@dataclass(frozen=True)
class Shape:
    """What is known of a function of one number.

    Attributes:
        function: itself.
        lowest: where it turns from falling to rising; -inf where it always rises, inf where it always falls.
        curvature: a bound of the size of its second derivative between corners; None: no lines are drawn.
        corners: where its slope jumps.
        domain: no smaller argument is allowed.
        jump: by how much it is off at most, besides rounding.
        floor: it is never below.
    """

    function: Callable[[Tensor], Tensor]
    lowest: float = -math.inf
    curvature: float | None = None
    corners: tuple[float, ...] = ()
    domain: float = -math.inf
    jump: float = 0.0
    floor: float = -math.inf


def apply(shape: Shape, value: Value) -> Value:
    """Return the function of a value; unbounded where the argument may leave the domain."""
    low, high = _interval(shape, value)
    low = low.clamp(min=shape.floor)
    inside = value.low > shape.domain if math.isfinite(shape.domain) else torch.ones_like(low, dtype=torch.bool)
    low = torch.where(inside, low, torch.full_like(low, -math.inf))
    high = torch.where(inside, high, torch.full_like(high, math.inf))
    if shape.curvature is None:
        return bounded_by(low, high, value)
    low, high = enclosed(low, high)
    found = Value(low, high, (value,))
    found.carry = found.chords = _Lines(shape, value, low, high)
    if shape.function is torch.relu:
        found.carry = _rectified(value, low, high).carry
    return found


@dataclass(frozen=True)
class _Lines:
    """Two lines around a function, drawn when they are asked for."""

    shape: Shape
    value: Value
    low: Tensor
    high: Tensor

    def __call__(self, rows: Tensor) -> Carried:
        carry = _with_lines(self.shape, self.value, self.low, self.high).carry
        assert carry is not None
        return carry(rows)


def _off(values: Tensor, arguments: Tensor) -> Tensor:
    return rounding_error(ULPS, values.abs() + arguments.abs())


def _interval(shape: Shape, value: Value) -> tuple[Tensor, Tensor]:
    ends = shape.function(value.low), shape.function(value.high)
    off = _off(torch.maximum(ends[0].abs(), ends[1].abs()), value.size) + shape.jump
    off = torch.nan_to_num(off, nan=math.inf)
    if shape.lowest == -math.inf:
        return ends[0] - off, ends[1] + off
    if shape.lowest == math.inf:
        return ends[1] - off, ends[0] + off
    turn = shape.function(value.low.clamp(min=shape.lowest).minimum(value.high))
    # Around the turn the function is flat: where it lies, to 15 digits, changes nothing.
    return torch.minimum(turn, torch.minimum(*ends)) - off, torch.maximum(*ends) + off


def _with_lines(shape: Shape, value: Value, low: Tensor, high: Tensor) -> Value:
    assert shape.curvature is not None
    width = value.high - value.low
    steps = torch.linspace(0, 1, _CELLS + 1, dtype=low.dtype, device=low.device).view(-1, *(1,) * low.dim())
    points = (value.low + steps * width).clamp(max=value.high)
    points[-1] = value.high
    if shape.corners:
        extra = [points[0].clamp(min=corner).minimum(value.high) for corner in shape.corners]
        points = torch.cat([points, torch.stack(extra)]).sort(0).values
    values = shape.function(points)
    slope = torch.where(width > 0, (values[-1] - values[0]) / width, torch.zeros_like(width))
    slope = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
    rest = values - slope * points
    bend = shape.curvature * points.diff(dim=0).square().amax(0) / 8
    off = (_off(values, points) + rounding_error(8, (slope * points).abs())).amax(0) + rounding_error(8, bend) + shape.jump
    bottom, top = rest.amin(0) - bend - off, rest.amax(0) + bend + off
    # The interval itself is two lines, and better ones where the cells are wide.
    flat = ~(top - bottom < high - low)
    slope = torch.where(flat, torch.zeros_like(slope), slope)
    return lines(low, high, value, (slope, torch.where(flat, low, bottom)), (slope, torch.where(flat, high, top)))


def _rectified(value: Value, low: Tensor, high: Tensor) -> Value:
    """Zhang et al.'s lines of a ReLU: the chord above; below, x or 0, whichever leaves the smaller area."""
    l, u = value.low, value.high  # noqa: E741
    active, silent = l >= 0, u <= 0
    width = torch.where(u > l, u - l, torch.ones_like(u))
    chord = torch.where(active, torch.ones_like(l), torch.where(silent, torch.zeros_like(l), u / width))
    chord = torch.where(chord.isfinite(), chord, torch.zeros_like(chord))
    # The line is above at both ends once its height is, however the slope was rounded; the function is convex.
    height = torch.where(
        active | silent, torch.zeros_like(l), torch.maximum(-chord * l, u - chord * u) + rounding_error(8, value.size)
    )
    below = torch.where(active | (~silent & (u > -l)), torch.ones_like(l), torch.zeros_like(l))
    return lines(low, high, value, (below, torch.zeros_like(l)), (chord, height))


def _gelu(options: Mapping[str, Any]) -> Shape:
    if options.get("approximate", "none") == "tanh":
        return Shape(partial(F.gelu, approximate="tanh"), lowest=-0.7524614220710162, curvature=0.81)
    return Shape(F.gelu, lowest=-0.7517915246935645, curvature=0.8)


def _clipped(options: Mapping[str, Any]) -> Shape:
    low, high = options.get("min_val", options.get("min")), options.get("max_val", options.get("max"))
    corners = tuple(float(end) for end in (low, high) if end is not None)
    return Shape(lambda x: x.clamp(low, high), curvature=0.0, corners=corners)


def _leaky(options: Mapping[str, Any]) -> Shape | None:
    slope = float(options.get("negative_slope", 0.01))
    return Shape(lambda x: F.leaky_relu(x, slope), curvature=0.0, corners=(0.0,)) if slope >= 0 else None


def _elu(options: Mapping[str, Any]) -> Shape | None:
    alpha, scale, inner = (float(options.get(name, 1.0)) for name in ("alpha", "scale", "input_scale"))
    if alpha < 0 or scale != 1 or inner != 1:
        return None
    return Shape(lambda x: F.elu(x, alpha), curvature=alpha, corners=(0.0,))


def _softplus(options: Mapping[str, Any]) -> Shape | None:
    if float(options.get("beta", 1)) != 1 or float(options.get("threshold", 20)) != 20:
        return None
    return Shape(F.softplus, curvature=0.25, jump=_SOFTPLUS_JUMP)


def _power(options: Mapping[str, Any]) -> Shape | None:
    exponent = options["exponent"]
    if not isinstance(exponent, (int, float)):
        return None
    if exponent == 2:
        return Shape(torch.square, lowest=0.0, curvature=2.0, floor=0.0)
    if exponent == 3:
        return Shape(lambda x: x * x * x)
    if exponent in (0.5, -0.5, -1):
        return {0.5: _ROOT, -0.5: _INVERSE_ROOT, -1: _INVERSE}[exponent]
    return None


_ROOT = Shape(torch.sqrt, domain=-1e-300, floor=0.0)
_INVERSE_ROOT = Shape(torch.rsqrt, lowest=math.inf, domain=0.0)
_INVERSE = Shape(torch.reciprocal, lowest=math.inf, domain=0.0)

SHAPES: dict[str, Shape | Callable[[Mapping[str, Any]], Shape | None]] = {
    "abs": Shape(torch.abs, lowest=0.0, curvature=0.0, corners=(0.0,), floor=0.0),
    "atan": Shape(torch.atan, curvature=0.65),
    "clamp": _clipped,
    "clamp_max": _clipped,
    "clamp_min": _clipped,
    "elu": _elu,
    "erf": Shape(torch.erf, curvature=0.97),
    "exp": Shape(torch.exp, floor=0.0),
    "gelu": _gelu,
    "hardsigmoid": Shape(F.hardsigmoid, curvature=0.0, corners=(-3.0, 3.0), floor=0.0),
    "hardswish": Shape(F.hardswish, lowest=-1.5, curvature=1 / 3, corners=(-3.0, 3.0)),
    "hardtanh": _clipped,
    "leaky_relu": _leaky,
    "log": Shape(torch.log, domain=0.0),
    "mish": Shape(F.mish, lowest=-1.1924312099109283, curvature=0.65),
    "pow": _power,
    "reciprocal": _INVERSE,
    "relu": Shape(torch.relu, curvature=0.0, corners=(0.0,), floor=0.0),
    "relu6": Shape(F.relu6, curvature=0.0, corners=(0.0, 6.0)),
    "rsqrt": _INVERSE_ROOT,
    "sigmoid": Shape(torch.sigmoid, curvature=0.097, floor=0.0),
    "silu": Shape(F.silu, lowest=-1.2784645427610738, curvature=0.5),
    "softplus": _softplus,
    "sqrt": _ROOT,
    "square": Shape(torch.square, lowest=0.0, curvature=2.0, floor=0.0),
    "tanh": Shape(torch.tanh, curvature=0.77),
}
"""By the operator's name; a function of the operator's options where they matter, None where they are not allowed for."""


def shape_of(name: str, options: Mapping[str, Any]) -> Shape | None:
    """Return what is known of an operator as a function of one number; None where nothing is."""
    found = SHAPES.get(name)
    return found if isinstance(found, Shape) or found is None else found(options)


@dataclass(frozen=True)
class Statistics:
    """How values are normalised: over which axes, after which shift.

    Attributes:
        axes: over which mean and variance are taken.
        eps: added to the variance.
        centred: whether the mean is subtracted.
    """

    axes: tuple[int, ...]
    eps: float
    centred: bool = True


def standardised(value: Value, how: Statistics) -> Value:
    r"""Return (x - mean) / sqrt(variance + eps) over some axes, or x / sqrt(mean of squares + eps) where it is not centred.

    With z the deviations, each in its interval, and R the sum of the other squares,
    :math:`y_i = z_i / \sqrt{(z_i^2 + R)/n + eps}` rises in :math:`z_i` and shrinks towards 0 in R; so its ends are those of
    :math:`z_i` with the least R away from 0, or the largest towards 0. Deviations add up to 0, so R is at least
    :math:`z_i^2 / (n - 1)` (Cauchy and Schwarz).
    """
    x, axes = value, how.axes
    n = math.prod(x.low.shape[axis] for axis in axes)

    def mean(v: Tensor) -> Tensor:
        return v.mean(axes, keepdim=True)

    def deviation(v: Tensor) -> Tensor:
        return v - mean(v) if how.centred else v

    center, radius = deviation(x.center), x.radius
    magnitude = x.size + mean(x.size) if how.centred else x.size
    if how.centred:
        radius = radius * (1 - 2 / n) + mean(radius) if n > 1 else torch.zeros_like(radius)
    low, high = enclosed(center - radius, center + radius, rounding_error(n + 2 * ULPS, magnitude))
    least = torch.where((low <= 0) & (high >= 0), torch.zeros_like(low), torch.minimum(low.abs(), high.abs())).square()
    most = torch.maximum(low.abs(), high.abs()).square()
    sums = [part.sum(axes, keepdim=True) for part in (least, most)]
    slack = rounding_error(n + ULPS, sums[1])
    others_least = (sums[0] - least - slack).clamp(min=0)
    others_most = sums[1] - most + slack

    def at(z: Tensor, away: Tensor, last: float) -> Tensor:
        own = z.square()
        rest = torch.where(away, others_least, others_most)
        if how.centred and n > 1:
            rest = torch.maximum(rest, own / (n - 1))
        # Squares may overflow, and z over infinity is no bound: such an end is that of all normalised values.
        return torch.where(torch.isfinite(own + rest), z / ((own + rest) / n + how.eps).sqrt(), torch.full_like(z, last))

    ends = at(low, low < 0, -math.sqrt(n)), at(high, high > 0, math.sqrt(n))
    off = rounding_error(4 * ULPS, torch.maximum(ends[0].abs(), ends[1].abs()))
    below, above = enclosed(*ends, off)
    # What the deviations are multiplied by lies between these two.
    scales = [1 / ((total + sign * slack).clamp(min=0) / n + how.eps).sqrt() for total, sign in ((sums[1], 1), (sums[0], -1))]
    middle = 0.5 * scales[0] + 0.5 * scales[1]
    spread = 0.5 * scales[1] - 0.5 * scales[0] + rounding_error(4 * ULPS, scales[1])
    rest = torch.maximum(low.abs(), high.abs()) * spread
    found = Value(below, above, (value,))
    found.carry = _Scaled(deviation, middle, rest, magnitude, n, torch.zeros_like(x.low))
    return found


@dataclass(frozen=True)
class _Scaled:
    """Rows of z s, s between two numbers: those of z times the middle, less what s may differ from it."""

    deviation: Callable[[Tensor], Tensor]
    middle: Tensor
    rest: Tensor
    magnitude: Tensor
    terms: int
    shape: Tensor

    def __call__(self, rows: Tensor) -> Carried:
        carried = transposed(lambda v: self.deviation(v) * self.middle, [self.shape], rows)
        number = -against(rows.abs(), self.rest) * (1 + 1e-6) - lost(rows, 2 * self.terms, self.middle.abs() * self.magnitude)
        return Carried(carried, number)


def softmax(value: Value, axis: int) -> Value:
    r"""Return e^x over their sum: each at an end of its interval, the others at their opposite ends.

    With :math:`o_i` the logarithm of the sum of the others' exponentials it is :math:`1 / (1 + e^{o_i - x_i})`; o is made of the
    sums from either side, so that nothing cancels.
    """
    n = value.low.shape[axis]
    with_size = 1 + torch.nan_to_num(value.size, posinf=0.0).amax(axis, keepdim=True)
    off = rounding_error(ULPS * (n + 4), with_size)
    below = torch.sigmoid(value.low - _others(value.high, axis) - off)
    above = torch.sigmoid(value.high - _others(value.low, axis) + off)
    below, above = below - rounding_error(ULPS, below), above + rounding_error(ULPS, above)
    return bounded_by(torch.nan_to_num(below, nan=0.0).clamp(0, 1), torch.nan_to_num(above, nan=1.0).clamp(0, 1), value)


def _others(x: Tensor, axis: int) -> Tensor:
    """Return log(sum of e^x_j over j other than i) for each i."""
    nothing = torch.full_like(x.narrow(axis, 0, 1), -math.inf)
    before = torch.cat([nothing, x.logcumsumexp(axis).narrow(axis, 0, x.shape[axis] - 1)], axis)
    behind = x.flip(axis).logcumsumexp(axis).narrow(axis, 0, x.shape[axis] - 1)
    return torch.logaddexp(before, torch.cat([nothing, behind], axis).flip(axis))
