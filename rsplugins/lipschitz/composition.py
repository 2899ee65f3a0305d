"""What is known of a node's Lipschitz constant: a small expression, evaluated when asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from rsplugins.lipschitz.convolution import Convolution
from rsplugins.lipschitz.norms import TOLERANCE, matrix_norm, times, up
from rsplugins.lipschitz.products import Product


class Operator(Protocol):
    """A linear map whose norm can be bounded."""

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return an upper bound of the spectral norm."""


@dataclass(frozen=True)
class Scale:
    """Multiplication by channel (dimension 1), ``factors`` of shape (C,) in float64."""

    factors: Tensor

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return the largest magnitude: exact."""
        largest = float(self.factors.abs().max())
        return largest if math.isfinite(largest) else math.inf


@dataclass(frozen=True)
class Dense:
    """Multiplication of the last dimension by a matrix (out, in) in float64."""

    matrix: Tensor

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return an upper bound of the spectral norm."""
        return matrix_norm(self.matrix, tolerance=tolerance)


@dataclass(frozen=True)
class Fixed:
    """A linear map of which only a bound of the norm is kept."""

    bound: float

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return the bound."""
        return self.bound


@dataclass(frozen=True)
class Adjoint:
    """A transposed convolution: the adjoint of a convolution has that one's norm."""

    operator: Convolution

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return an upper bound of the spectral norm."""
        return self.operator.norm(tolerance)


def fuse(first: Operator, second: Operator) -> Operator | None:
    """Return ``second`` after ``first`` as one operator where that is tighter than the product of norms, else None.

    Scales are folded into their neighbour's weights. Their rounding, a relative 2**-53 an entry, is covered by the slack of
    :func:`~rsplugins.lipschitz.norms.largest_norm`.
    """
    if isinstance(first, Scale) and isinstance(second, Scale):
        return Scale(_outward(first.factors * second.factors))
    if isinstance(first, Scale) and isinstance(second, Convolution):
        return second.scaled_in(first.factors)
    if isinstance(first, Scale) and isinstance(second, Dense):
        return Dense(second.matrix * first.factors)
    if isinstance(second, Scale) and isinstance(first, Convolution):
        return first.scaled_out(second.factors)
    if isinstance(second, Scale) and isinstance(first, Dense):
        return Dense(second.factors[:, None] * first.matrix)
    return None


def outward(factors: Tensor) -> Tensor:
    """Return computed factors moved away from zero by one unit in the last place, unless they are 0 or a power of two."""
    return _outward(factors)


def _outward(factors: Tensor) -> Tensor:
    mantissa = torch.frexp(factors.abs()).mantissa
    exact = (mantissa == 0.5) | (factors == 0)
    return torch.where(exact, factors, torch.nextafter(factors, torch.copysign(torch.full_like(factors, math.inf), factors)))


@dataclass(frozen=True, eq=False)
class Value:
    """A node as an expression over other nodes.

    Attributes:
        how: ``"sum"`` and ``"hypot"`` combine the gains times the inputs' constants; ``"operator"`` applies a linear map to one
            input; ``"input"`` is the image; ``"product"`` multiplies its two inputs.
        inputs: what it is computed from.
        gains: one factor for each input.
        operator: the linear map of ``"operator"``.
        rectifier: whether this is a ReLU, which the local refinement looks into.
        note: a word for tables.
        product: what is known of the factors of ``"product"``.
        spread: a bound of the distance between any two values of it, over all images; infinity where none is known.
    """

    how: Literal["input", "sum", "hypot", "operator", "product"]
    inputs: tuple[Value, ...] = ()
    gains: tuple[float, ...] = ()
    operator: Operator | None = None
    rectifier: bool = False
    note: str = ""
    product: Product | None = None
    spread: float = math.inf

    def through(self, gain: float, *, rectifier: bool = False, note: str = "", spread: float = math.inf) -> Value:
        """Return a ``gain``-Lipschitz function of this value."""
        return Value("sum", (self,), (gain,), rectifier=rectifier, note=note, spread=spread)

    def apply(self, operator: Operator, *, fusible: bool = True) -> Value:
        """Return a linear map of this value, fused with the map before it where that is tighter."""
        if fusible and self.operator is not None:
            fused = fuse(self.operator, operator)
            if fused is not None:
                return Value("operator", self.inputs, (), fused, note="fused")
        return Value("operator", (self,), (), operator)


def total(values: list[Value], gains: list[float]) -> Value:
    """Return a sum of values: the constants add up."""
    return Value("sum", tuple(values), tuple(gains))


def stacked(values: list[Value], gains: list[float]) -> Value:
    """Return values beside each other: the squares of the constants add up."""
    return Value("hypot", tuple(values), tuple(gains))


@dataclass
class Evaluation:
    """Constants of values, each computed once."""

    tolerance: float = TOLERANCE
    constants: dict[Value, float] = field(default_factory=dict)
    norms: dict[Value, float] = field(default_factory=dict)
    deviations: dict[Value, float] = field(default_factory=dict)

    def constant(self, value: Value) -> float:
        """Return an upper bound of the Lipschitz constant of a value as a function of the image."""
        if value not in self.constants:
            self.constants[value] = self._compute(value)
        return self.constants[value]

    def factor(self, value: Value) -> float:
        """Return what the value's own step contributes, given inputs of constant 1."""
        if value.how == "input":
            return 1.0
        if value.product is not None:
            return self.product(value, 1.0, 1.0)
        if value.operator is not None:
            if value not in self.norms:
                self.norms[value] = value.operator.norm(self.tolerance)
            return self.norms[value]
        return _combine(value, [1.0] * len(value.inputs))

    def deviation(self, value: Value, radius: float) -> float:
        """Return a bound of how far a value gets from its value at grey, within a radius of grey.

        It follows from the gains of each step on the whole set, never from constants, which may be those of a smaller ball.
        """
        if value not in self.deviations:
            if value.how == "input":
                return radius
            inputs = [self.deviation(v, radius) for v in value.inputs]
            if value.product is not None:
                found = value.product.deviation(*inputs)
            else:
                found = times(self.factor(value), inputs[0]) if value.operator is not None else _combine(value, inputs)
            self.deviations[value] = min(found, value.spread)
        return self.deviations[value]

    def product(self, value: Value, first: float, second: float) -> float:
        """Return a bound of the constant of a product of two values, from those of its factors."""
        assert value.product is not None  # the caller looked
        one, other = value.inputs
        radius = value.product.radius
        return value.product.constant(first, second, (self.deviation(one, radius), self.deviation(other, radius)))

    def _compute(self, value: Value) -> float:
        if value.how == "input":
            return 1.0
        inputs = [self.constant(v) for v in value.inputs]
        if value.product is not None:
            return self.product(value, *inputs)
        return times(self.factor(value), inputs[0]) if value.operator is not None else _combine(value, inputs)


def _combine(value: Value, inputs: list[float]) -> float:
    parts = [times(gain, constant) for gain, constant in zip(value.gains, inputs, strict=True)]
    if len(parts) == 1:
        return parts[0]
    if value.how == "sum":
        return up(math.fsum(parts))
    return up(up(math.hypot(*parts)))
