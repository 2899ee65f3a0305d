"""Rules of what takes several tensors or constants: sums, products, quotients, concatenations, bounds of a range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from rsplugins.lipschitz.activations import SILU
from rsplugins.lipschitz.arguments import Call, NoBoundError, Operand, Shape
from rsplugins.lipschitz.composition import Dense, Fixed, Scale, Value, outward, stacked, total
from rsplugins.lipschitz.norms import times
from rsplugins.lipschitz.selection import repeats


def add(call: Call) -> Value:
    """Bound a sum or difference with what broadcasting repeats; ``alpha`` multiplies one of the operands."""
    factor = abs(float(call.number("alpha", 1)))
    operands = {name: call.operand(name) for name in ("input", "other")}
    gains = {name: factor if name == call.options["scaled"] else 1.0 for name in operands}
    moving = [(o.value, o.shape, gains[name]) for name, o in operands.items() if o.value is not None]
    if len(moving) == 1 and moving[0][1:] == (call.out, 1.0):
        return moving[0][0]  # adding a constant: still affine
    return total([value for value, *_ in moving], [times(repeats(shape, call.out), gain) for _, shape, gain in moving])


def multiply(call: Call) -> Value:
    """Bound a product with a constant, and SiLU written out."""
    first, second = call.operand("input"), call.operand("other")
    if first.value is not None and second.value is not None:
        gated = call.options["swish"](call.arguments["input"], call.arguments["other"])
        if gated is not None:
            return call.values[gated].through(SILU)
        product = call.options["product"]()
        if product is None:
            raise _two_values()
        return Value("product", (first.value, second.value), product=product, note="on images")
    moving, factor = (second, first.constant) if first.value is None else (first, second.constant)
    return _scaled(moving, call.out, factor)


def divide(call: Call) -> Value:
    """Bound a quotient by a constant; rounding it would make jumps."""
    call.only("rounding_mode", None)
    first, second = call.operand("input"), call.operand("other")
    if second.value is not None:
        raise _two_values()
    divisor = _float64(second.constant)
    return _scaled(first, call.out, outward(1.0 / divisor))


def _two_values() -> NoBoundError:
    return NoBoundError("a product or quotient of two values that depend on the image has no global bound")


def _float64(constant: Any) -> Tensor:
    if isinstance(constant, Tensor):
        return constant.detach().cpu().double()
    return torch.tensor(float(constant), dtype=torch.float64)


def _scaled(operand: Operand, out: Shape, constant: Any) -> Value:
    """Return a product with a constant: folded where it goes by channel, else by its largest magnitude."""
    value, shape, factors = operand.value, operand.shape, _float64(constant)
    if value is None:
        raise NoBoundError("it has no operand that depends on the image")
    if not bool(torch.isfinite(factors).all()):
        return value.apply(Fixed(math.inf))
    aligned = (1,) * (len(out) - factors.dim()) + tuple(factors.shape)
    by_channel = factors.numel() == 1 or (len(out) > 1 and all(n == 1 for i, n in enumerate(aligned) if i != 1))
    if shape == out and by_channel and len(out) > 1:
        return value.apply(Scale(factors.reshape(-1).expand(out[1])), fusible=channels_second(value, shape))
    scaled = value.through(repeats(shape, out))
    return scaled.apply(Fixed(float(factors.abs().max())))


def channels_second(value: Value, shape: Shape) -> bool:
    """Return whether the rows of a map are the entries of dimension 1: a dense map of tokens has its channels last."""
    return not (isinstance(value.operator, Dense) and len(shape) != 2)


def stack(call: Call) -> Value:
    """Bound parts beside each other: the root of the sum of squares, whatever the dimension."""
    call.ignore("dim")
    call.read.add("tensors")
    parts = call.arguments.get("tensors")
    if isinstance(parts, fx.Node):
        if call.info[parts].shape is not None:
            raise NoBoundError(f"{call.name} is called with one tensor")
        return call.values[parts].through(1.0)  # all the pieces of one value, each once
    if not isinstance(parts, (tuple, list)):
        raise NoBoundError(f"{call.name} is called with tensors that are no list")
    values = []
    for part in parts:
        if not isinstance(part, fx.Node) or not call.info[part].varying:
            call.real("tensors", part)
        elif call.info[part].shape is None:
            raise NoBoundError(f"{call.name} is called with a list in which something is no tensor")
        else:
            values.append(call.values[part])
    return values[0].through(1.0) if len(values) == 1 else stacked(values, [1.0] * len(values))


def clamp(call: Call) -> Value:
    """Bound a cut to a constant range: no slope is above 1, and a range with more entries repeats the input's."""
    value, shape = call.source()
    for name in ("min", "max"):
        call.real(name, call.constant(name))
    return value.through(repeats(shape, call.out))
