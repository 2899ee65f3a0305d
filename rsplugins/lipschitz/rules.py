"""The Lipschitz rule of each operation, by a canonical name that modules, functions and methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsplugins.errors import UsageError
from rsplugins.lipschitz import windows
from rsplugins.lipschitz.activations import SLOPES
from rsplugins.lipschitz.convolution import Convolution, _each, resolve_padding
from rsplugins.lipschitz.norms import up
from rsplugins.lipschitz.values import Dense, Fixed, Scale, Value, outward, stacked, total

Shape = tuple[int, ...]
Rule = Callable[[Value, Shape, Shape, dict[str, Any]], Value]


class UnsupportedLayerError(UsageError):
    """A layer without a sound Lipschitz bound; the fix names a cut before it."""


class NoBoundError(Exception):
    """Raised by a rule: why this operation has no bound."""


def _double(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise NoBoundError("its weight depends on the image")
    return value.detach().cpu().double()


def convolution(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound a convolution: see :func:`~rsplugins.lipschitz.convolution.convolution_norm`."""
    weight = _double(options["weight"])
    dims = weight.dim() - 2
    mode = options.get("padding_mode", "zeros")
    if mode not in ("zeros", "circular"):
        raise NoBoundError(f"padding_mode={mode!r} repeats pixels, and only zeros and circular padding have a bound here")
    dilation = _each(options.get("dilation", 1), dims)
    operator = Convolution(
        weight,
        tuple(shape[-dims:]),
        _each(options.get("stride", 1), dims),
        resolve_padding(options.get("padding", 0), tuple(weight.shape[2:]), dilation),
        dilation,
        options.get("groups", 1),
        mode == "circular",
    )
    return value.apply(operator)


def linear(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound a matrix acting on the last dimension by its spectral norm."""
    # A scale acts on dimension 1, which is the last one of a flat input only.
    return value.apply(Dense(_double(options["weight"])), fusible=len(shape) == 2)


def batch_norm(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    r"""Bound eval-mode batch normalisation: :math:`\max_c |\gamma_c| / \sqrt{v_c + \epsilon}`, folded into a layer before it."""
    if options.get("training") or options.get("running_var") is None:
        raise NoBoundError("it normalises with the statistics of the batch, not with stored ones")
    variance = _double(options["running_var"])
    scale = 1.0 / torch.sqrt(variance + float(options.get("eps", 1e-5)))
    if options.get("weight") is not None:
        scale = scale * _double(options["weight"])
    # Four roundings at most, half a unit each.
    scale = outward(outward(scale)) * (1.0 + 2.0**-51)
    return value.apply(Scale(scale), fusible=_channels_second(value, shape))


def _channels_second(value: Value, shape: Shape) -> bool:
    # A dense map of tokens has its channels last, so a scale of dimension 1 is not one of its rows.
    return not (isinstance(value.operator, Dense) and len(shape) != 2)


def activation(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound a function applied entry by entry by its largest slope."""
    name = options["name"]
    slope = SLOPES[name](**{key: option for key, option in options.items() if key != "name"})
    if slope is None:
        raise NoBoundError(f"{name} has a jump, or no largest slope, with these settings")
    return value.through(slope, rectifier=name == "relu")


def keep(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound what moves or selects entries, each at most once."""
    return value.through(1.0)


def affine_keep(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound what is the identity in eval mode: nothing changes, and a scale can still be folded."""
    return value


def max_pool(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound max pooling by the root of how many windows see one pixel."""
    dims = options["dims"]
    if options.get("return_indices"):
        raise NoBoundError("it returns indices too")
    kernel = _each(options["kernel_size"], dims)
    stride = kernel if not options.get("stride") else _each(options["stride"], dims)
    padding, dilation = _each(options.get("padding", 0), dims), _each(options.get("dilation", 1), dims)
    spatial = zip(shape[-dims:], out[-dims:], kernel, stride, padding, dilation, strict=True)
    return value.through(windows.max_pool_norm([windows.pooling_positions(*settings) for settings in spatial]))


def avg_pool(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound average pooling by the norms of its one-dimensional factors."""
    dims = options["dims"]
    kernel = _each(options["kernel_size"], dims)
    stride = kernel if not options.get("stride") else _each(options["stride"], dims)
    padding = _each(options.get("padding", 0), dims)
    override = options.get("divisor_override")
    matrices = []
    for n, m, k, s, p in zip(shape[-dims:], out[-dims:], kernel, stride, padding, strict=True):
        positions = windows.pooling_positions(n, m, k, s, p)
        include = bool(options.get("count_include_pad", True))
        divisors = [1] * m if override else windows.average_divisors(n, m, k, s, p, include)
        matrices.append(windows.average_matrix(n, positions, divisors))
    norm = windows.kronecker_norm(matrices)
    return value.apply(Fixed(up(norm / abs(override)) if override else norm))


def adaptive_max_pool(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound adaptive max pooling as max pooling."""
    dims = options["dims"]
    sizes = zip(shape[-dims:], out[-dims:], strict=True)
    return value.through(windows.max_pool_norm([windows.adaptive_positions(n, m) for n, m in sizes]))


def adaptive_avg_pool(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound adaptive average pooling by the norms of its one-dimensional factors."""
    dims = options["dims"]
    matrices = []
    for n, m in zip(shape[-dims:], out[-dims:], strict=True):
        positions = windows.adaptive_positions(n, m)
        matrices.append(windows.average_matrix(n, positions, [len(window) for window in positions]))
    return value.apply(Fixed(windows.kronecker_norm(matrices)))


def mean(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    r"""Bound a mean over N entries by :math:`1/\sqrt N`, a sum by :math:`\sqrt N`, a maximum by 1."""
    count = math.prod(shape) // max(1, math.prod(out))
    root = math.sqrt(count)
    return value.apply(Fixed({"mean": up(1.0 / root), "sum": up(root), "max": 1.0}[options["name"]] if count > 1 else 1.0))


def softmax(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    r"""Bound softmax by 1/2: the magnitudes in a row of its Jacobian sum to :math:`2 p_i (1 - p_i) \le 1/2` (Gershgorin)."""
    return value.through(0.5)


def interpolate(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound resizing by the norms of its one-dimensional factors."""
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(options.get("mode", "nearest"), options.get("mode", "nearest"))
    if mode not in ("linear", "nearest", "nearest-exact") or options.get("antialias"):
        raise NoBoundError(f"mode={options.get('mode')!r} (antialias={bool(options.get('antialias'))}) has no bound here")
    dims = len(shape) - 2
    factors = options.get("scale_factor")
    scales = [None] * dims if factors is None or options.get("recompute_scale_factor") else _floats(factors, dims)
    sizes = zip(shape[2:], out[2:], scales, strict=True)
    align = options.get("align_corners")
    return value.apply(Fixed(windows.kronecker_norm([windows.interpolation_matrix(n, m, mode, align, s) for n, m, s in sizes])))


def _floats(value: Any, dims: int) -> list[float | None]:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else [float(value)] * dims


def pad(value: Value, shape: Shape, out: Shape, options: dict[str, Any]) -> Value:
    """Bound padding with a constant: an isometry, or a crop."""
    if options.get("mode", "constant") != "constant":
        raise NoBoundError(f"padding with mode={options['mode']!r} repeats pixels; padding with a constant has a bound")
    return value.through(1.0)


def combine(parts: list[Any], shapes: list[Shape], out: Shape, signless: bool = True) -> Value:
    """Bound a sum or difference of nodes and constants, with what broadcasting repeats."""
    values = [(part, shape) for part, shape in zip(parts, shapes, strict=True) if isinstance(part, Value)]
    if len(values) == 1 and values[0][1] == out:
        return values[0][0]  # adding a constant: still affine
    return total([value for value, _ in values], [repeats(shape, out) for _, shape in values])


def concatenate(parts: list[Any]) -> Value:
    """Bound parts beside each other: the root of the sum of squares."""
    values = [part for part in parts if isinstance(part, Value)]
    return values[0].through(1.0) if len(values) == 1 else stacked(values, [1.0] * len(values))


def multiply(value: Value, shape: Shape, out: Shape, factor: Any) -> Value:
    """Bound a product with a constant by its largest magnitude, or fold it where it goes by channel."""
    factors = _double(factor) if isinstance(factor, Tensor) else torch.tensor([float(factor)], dtype=torch.float64)
    if not bool(torch.isfinite(factors).all()):
        return value.apply(Fixed(math.inf))
    aligned = (1,) * (len(out) - factors.dim()) + tuple(factors.shape)
    by_channel = factors.numel() == 1 or (len(out) > 1 and all(n == 1 for i, n in enumerate(aligned) if i != 1))
    if shape == out and by_channel and len(out) > 1:
        return value.apply(Scale(factors.reshape(-1).expand(out[1])), fusible=_channels_second(value, shape))
    scaled = value.through(repeats(shape, out))
    return scaled.apply(Fixed(float(factors.abs().max())))


def repeats(shape: Shape, out: Shape) -> float:
    """Return the factor of broadcasting: the root of how often each entry appears."""
    times = math.prod(out) // max(1, math.prod(shape))
    return 1.0 if times <= 1 else up(math.sqrt(times))
