"""The Lipschitz rules of layers and of functions of one tensor, shared by modules, functions and methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsplugins.lipschitz import pooling
from rsplugins.lipschitz.activations import OPTIONS, SLOPES
from rsplugins.lipschitz.arguments import Call, Shape
from rsplugins.lipschitz.arguments import NoBoundError as NoBoundError  # rules raise it
from rsplugins.lipschitz.composition import Adjoint, Dense, Fixed, Scale, Value, outward
from rsplugins.lipschitz.convolution import Convolution, _each, resolve_padding
from rsplugins.lipschitz.joins import channels_second
from rsplugins.lipschitz.norms import up
from rsplugins.lipschitz.tracing import UnsupportedLayerError as UnsupportedLayerError

Rule = Callable[[Call], Value]


def _float64(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.is_complex():
        raise NoBoundError("its weight is no tensor of real numbers")
    return value.detach().cpu().double()


def convolution(call: Call) -> Value:
    """Bound a convolution: see :func:`~rsplugins.lipschitz.convolution.convolution_norm`."""
    value, shape = call.source()
    call.ignore("bias", "in_channels", "out_channels", "kernel_size")  # the weight says the rest
    weight = _float64(call.constant("weight"))
    dims = weight.dim() - 2
    if len(shape) != dims + 2:
        raise NoBoundError(f"{call.name} is called with an image that has no batch dimension")
    dilation = _each(call.constant("dilation", 1), dims)
    padding, circular = _padding(call, tuple(weight.shape[2:]), dilation)
    stride, groups = _each(call.constant("stride", 1), dims), int(call.number("groups", 1))
    operator = Convolution(weight, shape[-dims:], stride, padding, dilation, groups, circular)
    if operator.out_size != call.out[-dims:]:
        raise NoBoundError(f"{call.name} returns another size than its settings say")
    return value.apply(operator)


def transposed_convolution(call: Call) -> Value:
    """Bound a transposed convolution by the norm of the convolution that it is the adjoint of, from its outputs to its inputs."""
    value, shape = call.source()
    call.ignore("bias", "in_channels", "out_channels", "kernel_size")  # the weight says the rest
    call.ignore("output_padding")  # seen in the size of the result
    call.only("padding_mode", "zeros")
    weight = _float64(call.constant("weight"))
    dims = weight.dim() - 2
    if len(shape) != dims + 2:
        raise NoBoundError(f"{call.name} is called with an image that has no batch dimension")
    dilation = _each(call.constant("dilation", 1), dims)
    padding = resolve_padding(call.constant("padding", 0), tuple(weight.shape[2:]), dilation)
    stride, groups = _each(call.constant("stride", 1), dims), int(call.number("groups", 1))
    operator = Convolution(weight, call.out[-dims:], stride, padding, dilation, groups)
    if operator.out_size != shape[-dims:]:
        raise NoBoundError(f"{call.name} returns another size than its settings say")
    return value.apply(Adjoint(operator))


def _padding(call: Call, kernel: Shape, dilation: Shape) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Return a convolution's padding before and after, by dimension, and whether it is circular."""
    mode = call.constant("padding_mode", "zeros")
    if mode not in ("zeros", "circular"):
        raise NoBoundError(f"padding_mode={mode!r} repeats pixels, and only zeros and circular padding have a bound here")
    padding = resolve_padding(call.constant("padding", 0), kernel, dilation)
    sides = [side for pair in reversed(padding) for side in pair]
    made = call.constant("_reversed_padding_repeated_twice", sides)
    if mode == "circular" and list(made) != sides:
        raise NoBoundError("its padding was changed after it was made, which circular padding does not follow")
    return padding, mode == "circular"


def linear(call: Call) -> Value:
    """Bound a matrix acting on the last dimension by its spectral norm."""
    value, shape = call.source()
    call.ignore("bias", "in_features", "out_features")
    weight = _float64(call.constant("weight"))
    if weight.dim() != 2 or call.out != (*shape[:-1], weight.shape[0]):
        raise NoBoundError(f"{call.name} returns another size than a matrix times the input")
    # A scale acts on dimension 1, which is the last one of a flat input only.
    return value.apply(Dense(weight), fusible=len(shape) == 2)


def batch_norm(call: Call) -> Value:
    r"""Bound eval-mode batch normalisation: :math:`\max_c |\gamma_c| / \sqrt{v_c + \epsilon}`, folded into a layer before it."""
    value, shape = call.source()
    call.ignore("running_mean", "bias", "momentum", "num_features", "affine", "track_running_stats")
    variance, weight = call.constant("running_var"), call.constant("weight")
    if call.constant("training", False) or variance is None:
        raise NoBoundError("it normalises with the statistics of the batch, not with stored ones")
    scale = 1.0 / torch.sqrt(_float64(variance) + float(call.number("eps", 1e-5)))
    if weight is not None:
        scale = scale * _float64(weight)
    # Four roundings at most, half a unit each.
    scale = outward(outward(scale)) * (1.0 + 2.0**-51)
    return value.apply(Scale(scale), fusible=channels_second(value, shape))


def normalisation(call: Call) -> Value:
    r"""Bound layer and group normalisation by :math:`\max|\gamma| / \sqrt\epsilon`, whatever they are given.

    With n entries, s^2 = v + eps and z = (x - mean) / s, the Jacobian before the weights is
    :math:`(I - 11^T/n - zz^T/n) / s`. It is symmetric, 0 on constants, :math:`(1 - |z|^2/n)/s = \epsilon/s^3` on z, and 1/s on
    what is orthogonal to both; so its norm is at most 1/s, and s is at least the root of eps.

    The squares of z sum to at most n, so that two results are no further apart than :math:`2 \max|\gamma| \sqrt N`, N entries in
    all.
    """
    value, shape = call.source()
    call.ignore("bias", "normalized_shape", "num_groups", "num_channels", "elementwise_affine", "affine")
    eps = float(call.number("eps", 1e-5))
    if eps <= 0:
        raise NoBoundError("it divides by a deviation that may be 0, as its eps is")
    weight = call.constant("weight")
    largest = 1.0 if weight is None else float(_float64(weight).abs().max())
    spread = up(up(2.0 * largest * math.sqrt(math.prod(shape))) * (1.0 + 2.0**-50))
    return value.through(up(up(largest / math.sqrt(eps)) * (1.0 + 2.0**-50)), spread=spread)


def activation(call: Call) -> Value:
    """Bound a function applied entry by entry by its largest slope."""
    value, _ = call.source()
    name = call.options["name"]
    call.only("inplace", False, True)
    if name == "gelu":
        settings: dict[str, Any] = {"approximate": call.only("approximate", "none", "tanh")}
    else:
        settings = {key: call.number(key, math.nan) for key in OPTIONS.get(name, ()) if key in call.arguments}
    slope = SLOPES[name](**settings)
    if slope is None:
        raise NoBoundError(f"{name} has a jump, or no largest slope, with these settings")
    return value.through(slope, rectifier=name == "relu")


def identity(call: Call) -> Value:
    """Bound what is the identity in eval mode, whatever its settings: nothing changes, and a scale can still be folded."""
    value, _ = call.source()
    call.ignore(*call.given()[1:])
    return value


def conversion(call: Call) -> Value:
    """Bound a conversion to a format that is not coarser than float32: the identity."""
    value, _ = call.source()
    call.only("dtype", torch.float32, torch.float64)
    return value


def dropout(call: Call) -> Value:
    """Bound dropout that is switched off: the identity."""
    value, _ = call.source()
    call.ignore("p", "inplace")
    # A layer's own `training` is that of the network, which is in eval mode; the function's is an argument, by default True.
    if not call.options["layer"] and call.constant("training", True):
        raise NoBoundError("this dropout is active in eval mode")
    return value


def max_pool(call: Call) -> Value:
    """Bound max pooling by the root of how many windows see one pixel."""
    value, shape = call.source()
    dims = call.options["dims"]
    call.only("return_indices", False)
    kernel, stride, padding = _windows(call, dims)
    dilation = _each(call.constant("dilation", 1), dims)
    spatial = zip(shape[-dims:], call.out[-dims:], kernel, stride, padding, dilation, strict=True)
    return value.through(pooling.max_pool_norm([pooling.pooling_positions(*settings) for settings in spatial]))


def _windows(call: Call, dims: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Return kernel, stride and padding by dimension; ``ceil_mode`` is seen in the size of the result."""
    call.ignore("ceil_mode")
    kernel, stride = _each(call.constant("kernel_size"), dims), call.constant("stride")
    return kernel, _each(stride, dims) if stride else kernel, _each(call.constant("padding", 0), dims)


def avg_pool(call: Call) -> Value:
    """Bound average pooling by the norms of its one-dimensional factors."""
    value, shape = call.source()
    dims = call.options["dims"]
    kernel, stride, padding = _windows(call, dims)
    override = call.constant("divisor_override")
    include = bool(call.constant("count_include_pad", True))
    matrices = []
    for n, m, k, s, p in zip(shape[-dims:], call.out[-dims:], kernel, stride, padding, strict=True):
        positions = pooling.pooling_positions(n, m, k, s, p)
        divisors = [1] * m if override else pooling.average_divisors(n, m, k, s, p, include)
        matrices.append(pooling.average_matrix(n, positions, divisors))
    norm = pooling.kronecker_norm(matrices)
    return value.apply(Fixed(up(norm / abs(override)) if override else norm))


def adaptive_max_pool(call: Call) -> Value:
    """Bound adaptive max pooling as max pooling."""
    value, shape = call.source()
    dims = call.options["dims"]
    call.ignore("output_size")  # seen in the size of the result
    call.only("return_indices", False)
    sizes = zip(shape[-dims:], call.out[-dims:], strict=True)
    return value.through(pooling.max_pool_norm([pooling.adaptive_positions(n, m) for n, m in sizes]))


def adaptive_avg_pool(call: Call) -> Value:
    """Bound adaptive average pooling by the norms of its one-dimensional factors."""
    value, shape = call.source()
    dims = call.options["dims"]
    call.ignore("output_size")  # seen in the size of the result
    matrices = []
    for n, m in zip(shape[-dims:], call.out[-dims:], strict=True):
        positions = pooling.adaptive_positions(n, m)
        matrices.append(pooling.average_matrix(n, positions, [len(window) for window in positions]))
    return value.apply(Fixed(pooling.kronecker_norm(matrices)))


def reduction(call: Call) -> Value:
    r"""Bound a mean over N entries by :math:`1/\sqrt N`, a sum by :math:`\sqrt N`, a maximum by 1."""
    value, shape = call.source()
    call.ignore("dim", "keepdim")  # seen in the size of the result
    call.precise()
    count = math.prod(shape) // max(1, math.prod(call.out))
    root = math.sqrt(count)
    return value.apply(Fixed({"mean": up(1.0 / root), "sum": up(root), "max": 1.0}[call.options["name"]] if count > 1 else 1.0))


def softmax(call: Call) -> Value:
    r"""Bound softmax by 1/2: the magnitudes in a row of its Jacobian sum to :math:`2 p_i (1 - p_i) \le 1/2` (Gershgorin)."""
    value, _ = call.source()
    call.ignore("dim", "_stacklevel")  # any dimension
    call.precise()
    return value.through(0.5)


def interpolate(call: Call) -> Value:
    """Bound resizing by the norms of its one-dimensional factors."""
    value, shape = call.source()
    call.ignore("size")  # seen in the size of the result
    call.only("antialias", False)
    factors, again = call.constant("scale_factor"), call.constant("recompute_scale_factor")
    return value.apply(
        resizing(shape, call.out, call.constant("mode", "nearest"), call.constant("align_corners"), None if again else factors)
    )


def resizing(shape: Shape, out: Shape, mode: str, align_corners: bool | None, scale_factor: Any) -> Fixed:
    """Return resizing from one shape to another, batch and channels first, as an operator.

    Args:
        shape: of the input.
        out: of the result.
        mode: of :func:`torch.nn.functional.interpolate`.
        align_corners: likewise.
        scale_factor: where the positions follow from it instead of from the sizes, else None.

    Raises:
        NoBoundError: the mode has no bound here.
    """
    linear = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    if linear not in ("linear", "nearest", "nearest-exact"):
        raise NoBoundError(f"mode={mode!r} has no bound here")
    dims = len(shape) - 2
    scales = [None] * dims if scale_factor is None else _floats(scale_factor, dims)
    sizes = zip(shape[2:], out[2:], scales, strict=True)
    matrices = [pooling.interpolation_matrix(n, m, linear, align_corners, s) for n, m, s in sizes]
    if any(matrix.shape[0] != m for matrix, m in zip(matrices, out[2:], strict=True)):
        raise NoBoundError("it returns another size than its settings say")
    return Fixed(pooling.kronecker_norm(matrices))


def _floats(value: Any, dims: int) -> list[float | None]:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else [float(value)] * dims
