"""What each aten operator makes of enclosed values. The table is closed: an operator that it does not account for is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.aten.functions import Shape, Statistics, apply, shape_of, softmax, standardised
from rsplugins.aten.values import (
    ROUNDINGS,
    Carried,
    Value,
    added,
    averaged,
    bounded_by,
    constant_part,
    enclosed,
    lost,
    moved,
    multiplied,
    point,
    product,
    rounding_error,
    transposed,
)

_FORMATS = (None, torch.float32, torch.float64)
"""In which an operator may be asked to compute or to give its result: coarser ones round to more than rounding."""

Result: TypeAlias = "Value | list[Value] | None"


@dataclass(frozen=True)
class Call:
    """One operator of a graph.

    Attributes:
        name: without the overload.
        arguments: by the names of its schema; tensors of the network are values, others are what they are.
        run: (*tensors in the place of the values, in order) -> what the operator itself returns.
        values: of the arguments, in order.
    """

    name: str
    arguments: Mapping[str, Any]
    run: Callable[..., Any]
    values: list[Value]

    def value(self, name: str) -> Value | None:
        """Return an argument as a value; None where it is absent."""
        found = self.arguments.get(name)
        if isinstance(found, Tensor):
            return point(found)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            like = self.values[0].low
            return point(torch.tensor(found, dtype=like.dtype, device=like.device))
        return found if isinstance(found, Value) else None

    def needed(self, name: str) -> Value:
        """Return an argument that has to be there."""
        found = self.value(name)
        if found is None:
            raise KeyError(name)
        return found


Rule: TypeAlias = Callable[[Call], Result]


def _move(call: Call) -> Result:
    """Operators that only place values; several arguments (cat, stack) and several results (split) as well."""
    tried = call.run(*(value.low for value in call.values))
    if isinstance(tried, Tensor):
        return moved(call.run, call.values[0]) if len(call.values) == 1 else _gathered(call)
    if len(call.values) != 1:
        return None
    return [moved(_place(call.run, i), call.values[0]) for i in range(len(tried))]


def _place(run: Callable[..., Any], i: int) -> Callable[[Tensor], Tensor]:
    def function(tensor: Tensor) -> Tensor:
        found: Tensor = run(tensor)[i]
        return found

    return function


def _gathered(call: Call) -> Value:
    """Cat and stack: one value after the other, among zeros, and their exact sum."""
    parts = call.values
    low, high = call.run(*(part.low for part in parts)), call.run(*(part.high for part in parts))
    shapes = [torch.zeros_like(part.low) for part in parts]

    def carry(rows: Tensor) -> Carried:
        return Carried(transposed(call.run, shapes, rows), rows.new_zeros(len(rows)))

    return Value(low, high, tuple(parts), carry, affine=True)


def _view(call: Call) -> Result:
    size = call.arguments["size"]
    return moved(lambda x: x.reshape(size), call.needed("self"))


def _add(call: Call) -> Result:
    sign = 1 if call.name == "add" else -1
    one, two = call.needed("self"), call.needed("other")
    alpha = call.arguments.get("alpha", 1)
    if call.name == "rsub":
        one, two = two, one
    if alpha != 1:
        return None
    return added(one, two, sign)


def _neg(call: Call) -> Result:
    return added(point(torch.zeros_like(call.values[0].low)), call.values[0], -1)


def _mul(call: Call) -> Result:
    return multiplied(call.needed("self"), call.needed("other"))


def _div(call: Call) -> Result:
    if call.arguments.get("rounding_mode") is not None:
        return None
    return _quotient(call.needed("self"), call.needed("other"))


def _reciprocal(call: Call) -> Result:
    below = call.values[0]
    return _quotient(point(torch.ones_like(below.low)), below)


def _quotient(above: Value, below: Value) -> Value:
    """Unbounded where the divisor may be 0."""
    positive, negative = bool((below.low > 0).all()), bool((below.high < 0).all())
    inverse = shape_of("reciprocal", {})
    assert inverse is not None
    if positive:
        return multiplied(above, apply(inverse, below))
    if negative:
        turned = added(point(torch.zeros_like(below.low)), below, -1)
        return added(point(torch.zeros_like(below.low)), multiplied(above, apply(inverse, turned)), -1)
    everything = torch.full_like(above.low * below.low, math.inf)
    return bounded_by(-everything, everything, above, below)


def _linear(call: Call) -> Result:
    weight = call.needed("weight")
    found = product(lambda x, w: F.linear(x, w), call.needed("input"), weight, max(weight.low.shape))
    return _biased(found, call.value("bias"))


def _biased(found: Value, bias: Value | None, axes: int = 0) -> Value:
    if bias is None:
        return found
    return added(found, moved(lambda b: b.reshape(-1, *(1,) * axes), bias))


def _convolution(call: Call) -> Result:
    names = ("stride", "padding", "dilation", "groups")
    options = {name: call.arguments[name] for name in names if name in call.arguments}
    convolve = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}[call.name]
    weight = call.needed("weight")
    terms = weight.low.numel() // min(weight.low.shape[:2])
    found = product(lambda x, w: convolve(x, w, None, **options), call.needed("input"), weight, terms)
    return _biased(found, call.value("bias"), weight.low.dim() - 2)


def _matmul(call: Call) -> Result:
    one, two = (call.needed(name) for name in (("self", "mat2") if call.name in ("mm", "bmm") else ("self", "other")))
    # An entry of a matrix takes part in as many outputs as the other has rows or columns, and in each of the batch.
    return product(torch.matmul, one, two, _fan(torch.matmul, one, two))


def _fan(function: Callable[..., Tensor], one: Value, two: Value) -> int:
    """Return how many products an output is a sum of, and how many outputs an entry takes part in, at most."""
    outputs = function(torch.zeros_like(one.low), torch.zeros_like(two.low)).numel()
    products = outputs * one.low.shape[-1]
    return max(one.low.shape[-1], products // max(min(one.low.numel(), two.low.numel()), 1)) + 1


def _einsum(call: Call) -> Result:
    parts = call.arguments["tensors"]
    if len(parts) != 2:
        return None
    one, two = (part if isinstance(part, Value) else point(part) for part in parts)
    equation = call.arguments["equation"]

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum(equation, x, y)

    sizes = {
        letter: size
        for term, part in zip(equation.split("->")[0].split(","), (one, two), strict=True)
        for letter, size in zip(term.replace(" ", ""), part.low.shape, strict=True)
    }
    return product(function, one, two, math.prod(sizes.values()))


def _attention(call: Call) -> Result:
    """softmax(Q K^T scale + mask) V; a mean of the values with weights that sum to 1, so within their hull."""
    a = call.arguments
    mask = a.get("attn_mask")
    if (
        a.get("dropout_p", 0.0)
        or a.get("is_causal")
        or a.get("enable_gqa")
        or (isinstance(mask, Tensor) and not mask.is_floating_point())
    ):
        return None
    query, key, value = (call.needed(name) for name in ("query", "key", "value"))
    scale = query.low.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]

    def scores_of(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)

    scores = product(scores_of, query, key, max(query.low.shape[-1], query.low.shape[-2], key.low.shape[-2]))
    scores = multiplied(scores, point(torch.tensor(scale).to(scores.low)))
    if mask is not None:
        scores = added(scores, call.needed("attn_mask"))
    weights = softmax(scores, scores.low.dim() - 1)
    found = product(torch.matmul, weights, value, max(weights.low.shape[-1], weights.low.shape[-2], value.low.shape[-1]))
    hull = value.low.amin(-2, keepdim=True), value.high.amax(-2, keepdim=True)
    found.low, found.high = torch.maximum(found.low, hull[0]), torch.minimum(found.high, hull[1])
    return found


def _softmax(call: Call) -> Result:
    if call.arguments.get("half_to_float"):
        return None
    value = call.values[0]
    return softmax(value, call.arguments["dim"] % value.low.dim())


def _mean(call: Call) -> Result:
    value = call.values[0]
    axes = call.arguments.get("dim")
    axes = tuple(range(value.low.dim())) if axes in (None, []) else tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    return averaged(call.run, value, math.prod(value.low.shape[axis] for axis in axes))


def _pool(call: Call) -> Result:
    value = call.values[0]
    kernel = call.arguments.get("kernel_size")
    if kernel is None:  # adaptive: windows differ
        return averaged(call.run, value, value.low.numel() // max(math.prod(value.low.shape[:2]), 1))
    return averaged(call.run, value, math.prod(kernel) ** 2 if len(kernel) == 1 else math.prod(kernel))


def _max_pool(call: Call) -> Result:
    """The largest of each window: at least the value that is the largest by its lower end."""
    value = call.values[0]
    options = {k: v for k, v in call.arguments.items() if k in ("kernel_size", "padding", "dilation", "ceil_mode")}
    options["stride"] = call.arguments.get("stride") or call.arguments["kernel_size"]
    low, places = F.max_pool2d(value.low, return_indices=True, **options)
    high = F.max_pool2d(value.high, **options)
    flat = places.flatten(-2)

    def chosen(x: Tensor) -> Tensor:
        return x.flatten(-2).gather(-1, flat).view(low.shape)

    shape = torch.zeros_like(value.low)

    def carry(rows: Tensor) -> Carried:
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        fan = math.prod(options["kernel_size"]) ** 2
        number = constant_part(down, torch.zeros_like(low), high) - lost(up, fan, torch.maximum(low.abs(), high.abs()))
        return Carried(transposed(chosen, [shape], up), number)

    return Value(low, high, (value,), carry)


def _batch_norm(call: Call) -> Result:
    x = call.needed("input")
    shape = (-1, *(1,) * (x.low.dim() - 2))
    if call.name == "_native_batch_norm_legit":  # of the batch itself: weights that are standardised
        if not call.arguments.get("training", True):
            return None
        axes = tuple(axis for axis in range(x.low.dim()) if axis != 1)
        scaled = standardised(x, Statistics(axes, float(call.arguments["eps"])))
    else:
        mean, variance = call.needed("running_mean"), call.needed("running_var")
        eps = point(torch.tensor(float(call.arguments["eps"])).to(x.low))
        inverse = shape_of("rsqrt", {})
        assert inverse is not None
        scale = apply(inverse, added(variance, eps))
        weight = call.value("weight")
        scale = scale if weight is None else multiplied(scale, weight)
        shift = multiplied(mean, scale)
        bias = call.value("bias")
        shift = added(point(torch.zeros_like(shift.low)) if bias is None else bias, shift, -1)
        scaled = multiplied(x, moved(lambda s: s.view(shape), _constant(scale)))
        return [added(scaled, moved(lambda s: s.view(shape), _constant(shift)))]
    return [_scaled(scaled, call, lambda s: s.view(shape))]


def _constant(value: Value) -> Value:
    """Return a value that does not depend on the input, without how it was computed."""
    return Value(value.low, value.high)


def _scaled(found: Value, call: Call, place: Callable[[Tensor], Tensor]) -> Value:
    weight, bias = call.value("weight"), call.value("bias")
    found = found if weight is None else multiplied(found, moved(place, weight))
    return found if bias is None else added(found, moved(place, bias))


def _layer_norm(call: Call) -> Result:
    x = call.needed("input")
    last = len(call.arguments["normalized_shape"])
    eps = call.arguments.get("eps", 1e-5)
    if eps is None:  # of the format that the model is run in
        return None
    axes = tuple(range(x.low.dim() - last, x.low.dim()))
    return _scaled(standardised(x, Statistics(axes, float(eps), call.name == "layer_norm")), call, lambda s: s)


def _group_norm(call: Call) -> Result:
    x, groups = call.needed("input"), call.arguments["num_groups"]
    whole, trailing = x.low.shape, (1,) * (x.low.dim() - 2)
    split = moved(lambda v: v.reshape(whole[0], groups, -1), x)
    found = standardised(split, Statistics((2,), float(call.arguments.get("eps", 1e-5))))
    return _scaled(moved(lambda v: v.reshape(whole), found), call, lambda s: s.view(-1, *trailing))


def _norm(call: Call) -> Result:
    """The l2 norm over some axes."""
    if call.arguments.get("ord", 2) != 2:
        return None
    value, axes = call.values[0], call.arguments.get("dim")
    square, root = shape_of("square", {}), shape_of("sqrt", {})
    assert square is not None
    assert root is not None
    axes = tuple(range(value.low.dim())) if axes is None else tuple(axes)
    squares = apply(square, value)
    total = averaged(
        lambda v: v.sum(axes, keepdim=bool(call.arguments.get("keepdim"))), squares, math.prod(value.low.shape[a] for a in axes)
    )
    total.low = total.low.clamp(min=0)
    return apply(root, total)


def _ends(call: Call) -> Result:
    """Operators that rise in each of their arguments and compare without arithmetic."""
    run = [call.run(*(getattr(value, end) for value in call.values)) for end in ("low", "high")]
    if not isinstance(run[0], Tensor):  # with indices, which nobody may use
        return [bounded_by(run[0][0], run[1][0], *call.values)]
    return bounded_by(run[0], run[1], *call.values)


def _interpolated(call: Call) -> Result:
    """Bilinear and nearest: means of neighbours."""
    value = call.values[0]
    grown = call.run(torch.zeros_like(value.low)).numel() // max(value.low.numel(), 1)
    shrunk = value.low.numel() // max(call.run(torch.zeros_like(value.low)).numel(), 1)
    return averaged(call.run, value, 64 * (1 + grown) * (1 + shrunk))


def _cubic(call: Call) -> Result:
    """Bicubic resizing, of positions for another size: the sizes of its weights add up to less than 3."""
    value = call.values[0]
    center = call.run(value.center)
    off = 3 * value.radius.max() + 3 * rounding_error(value.low.numel() + ROUNDINGS, value.size.max())
    return bounded_by(center - off, center + off, value)


def _wave(call: Call) -> Result:
    value = call.values[0]
    center, radius = call.run(value.center), value.radius
    off = rounding_error(4, ROUNDINGS + value.size)
    low, high = enclosed(center - radius, center + radius, off)
    return bounded_by(low.clamp(min=-1), high.clamp(max=1), value)


def _power_of(call: Call) -> Result:
    """b^x of a number b of at least 1."""
    base = call.arguments["self"]
    if not isinstance(base, (int, float)) or base < 1:
        return None
    shape = Shape(lambda x: torch.pow(base, x), floor=0.0)
    value = call.values[0]
    found = apply(shape, value)
    wider = rounding_error(2, value.size * math.log(base) * found.high.abs())
    return bounded_by(found.low - wider, found.high + wider, value)


def _cast(call: Call) -> Result:
    """From one format to another that holds the values of the first: nothing, in exact arithmetic."""
    kind = call.needed("other").low.dtype if call.name == "type_as" else call.arguments.get("dtype")
    return moved(lambda v: v, call.needed("self")) if kind in _FORMATS else None


def _cumsum(call: Call) -> Result:
    value, axis = call.values[0], call.arguments["dim"]
    return averaged(lambda v: v.cumsum(axis), value, value.low.shape[axis])


MOVING = frozenset(
    "alias cat chunk clone concat contiguous detach dropout expand expand_as flatten flip gather index index_select lift "  # noqa: SIM905
    "lift_fresh_copy movedim narrow permute pixel_shuffle pixel_unshuffle repeat repeat_interleave roll select slice split "
    "split_with_sizes squeeze stack t tile transpose unbind unflatten unfold unsqueeze".split()
)
"""Operators that only place values."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVING, _move),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), _pool),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_native_batch_norm_legit"), _batch_norm),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("maximum", "minimum", "amax", "amin", "max", "min", "adaptive_max_pool2d"), _ends),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa"), _interpolated),
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bicubic2d_aa"), _cubic),
    **dict.fromkeys(("sin", "cos"), _wave),
    "cumsum": _cumsum,
    "div": _div,
    "einsum": _einsum,
    "group_norm": _group_norm,
    "linalg_vector_norm": _norm,
    "linear": _linear,
    "max_pool2d": _max_pool,
    "mul": _mul,
    "neg": _neg,
    "reciprocal": _reciprocal,
    "scaled_dot_product_attention": _attention,
}


def rule_for(call: Call) -> Rule | None:
    """Return an operator's rule; None where there is none for it, or for its options."""
    if call.arguments.get("dtype") not in _FORMATS or (call.name == "dropout" and call.arguments.get("train")):
        return None
    if call.name == "pow" and not isinstance(call.arguments.get("self"), Value):
        return _power_of
    if call.name == "pad":
        mode = call.arguments.get("mode", "constant")
        return _padded if mode == "constant" and not isinstance(call.arguments.get("value"), Value) else None
    if call.name in RULES:
        return RULES[call.name]
    shape = shape_of(call.name, call.arguments)
    return None if shape is None or len(call.values) != 1 else lambda one: apply(shape, one.values[0])


def _padded(call: Call) -> Result:
    value = call.values[0]
    found = moved(lambda v: F.pad(v, call.arguments["pad"]), value)
    filling = call.arguments.get("value") or 0.0
    if not filling:
        return found
    frame = call.run(torch.zeros_like(value.low))
    if math.isfinite(filling):
        return added(found, point(frame))
    # Before a maximum, which never takes it; rows that do are bounded by nothing.
    within, outside = found.carry, frame.isinf().to(frame.dtype)

    def carry(rows: Tensor) -> Carried:
        assert within is not None  # moved() gives one
        carried = within(torch.where(outside > 0, torch.zeros_like(rows), rows))
        takes = (rows.abs() * outside).flatten(1).sum(1) > 0
        return Carried(carried.rows, torch.where(takes, torch.full_like(carried.number, -math.inf), carried.number))

    return Value(call.run(value.low), call.run(value.high), (value,), carry, affine=True)
