"""From a node of a graph to the rule that bounds it: modules, functions and methods under one name."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rsplugins.lipschitz import rules
from rsplugins.lipschitz.activations import FUNCTIONS, MODULES, OPTIONS, SLOPES
from rsplugins.lipschitz.purity import computes_as
from rsplugins.lipschitz.rules import NoBoundError, Shape
from rsplugins.lipschitz.tracing import Preprocess, Traced
from rsplugins.lipschitz.values import Scale, Value, outward

_DIMS = {
    1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d),
    2: (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d),
}
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode", "count_include_pad", "divisor_override")
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")

_MODULES: dict[type[nn.Module], tuple[rules.Rule, tuple[str, ...], dict[str, Any]]] = {
    nn.Linear: (rules.linear, ("weight",), {}),
    nn.Identity: (rules.affine_keep, (), {}),
    nn.Flatten: (rules.keep, (), {}),
    nn.Unflatten: (rules.keep, (), {}),
    nn.PixelUnshuffle: (rules.keep, (), {}),
    nn.PixelShuffle: (rules.keep, (), {}),
    nn.ChannelShuffle: (rules.keep, (), {}),
    nn.Softmax: (rules.softmax, (), {}),
    nn.Upsample: (rules.interpolate, ("mode", "align_corners", "scale_factor", "recompute_scale_factor"), {}),
    **{kind: (rules.activation, OPTIONS.get(name, ()), {"name": name}) for kind, name in MODULES.items()},
    **{kind: (rules.affine_keep, (), {}) for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)},
    **{
        kind: (rules.pad, (), {})
        for kind in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
    },
    **{kind: (rules.convolution, ("weight", *_CONVOLUTION), {}) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{kind: (rules.max_pool, _POOL, {"dims": d}) for d, (_, kind, _) in _DIMS.items()},
    **{kind: (rules.avg_pool, _POOL, {"dims": d}) for d, (_, _, kind) in _DIMS.items()},
    **{
        kind: (rules.adaptive_avg_pool, (), {"dims": d})
        for d, kind in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)
    },
    **{
        kind: (rules.adaptive_max_pool, (), {"dims": d})
        for d, kind in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)
    },
    **{
        kind: (rules.batch_norm, ("running_mean", "running_var", "weight", "bias", "eps"), {})
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    },
}

_MAX_MIN = ("rsplugins.lipschitz.orthogonal.MaxMin", "orthogonium.layers.custom_activations.MaxMin")
"""Sorting pairs is a permutation on each of finitely many pieces and continuous, hence 1-Lipschitz."""

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")

_FUNCTIONS: dict[Any, tuple[rules.Rule, tuple[str, ...], dict[str, Any]]] = {
    F.linear: (rules.linear, ("input", "weight", "bias"), {}),
    F.batch_norm: (rules.batch_norm, _BATCH_NORM, {}),
    F.interpolate: (rules.interpolate, _INTERPOLATE, {}),
    F.pad: (rules.pad, ("input", "pad", "mode", "value"), {}),
    F.softmax: (rules.softmax, (), {}),
    torch.softmax: (rules.softmax, (), {}),
    **{
        f: (rules.convolution, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), {})
        for f in (F.conv1d, F.conv2d, F.conv3d)
    },
    **{f: (rules.max_pool, _MAX_POOL, {"dims": d}) for d, f in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d), 1)},
    **{f: (rules.avg_pool, _AVG_POOL, {"dims": d}) for d, f in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), 1)},
    **{
        f: (rules.adaptive_avg_pool, (), {"dims": d})
        for d, f in enumerate((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), 1)
    },
    **{
        f: (rules.adaptive_max_pool, (), {"dims": d})
        for d, f in enumerate((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), 1)
    },
    **{f: (rules.keep, (), {}) for f in (F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.movedim)},
    **{f: (rules.activation, ("input", *OPTIONS.get(name, ("inplace",))), {"name": name}) for f, name in FUNCTIONS.items()},
    **{
        getattr(torch, name): (rules.activation, (), {"name": name})
        for name in ("relu", "tanh", "sigmoid", "abs", "neg", "clamp", "sin", "cos")
    },
    operator.neg: (rules.activation, (), {"name": "neg"}),
}
for _dropout in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
    _FUNCTIONS[_dropout] = (rules.affine_keep, ("input", "p", "training", "inplace"), {"dropout": True})

_HOMES = (torch, F, operator, torch._C._nn)
_REDUCTIONS = {"mean": "mean", "sum": "sum", "amax": "max", "amin": "max"}
_MOVES = {
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
    "unbind", "roll", "flip", "narrow", "float", "double", "clone", "detach", "swapaxes", "movedim", "select", "t",
    "tensor_split",
}  # fmt: skip
_SUMS = {"add": False, "add_": False, "iadd": False, "sub": True, "sub_": True, "isub": True, "rsub": True, "subtract": True}
_PRODUCTS = {"mul", "mul_", "imul", "multiply"}
_QUOTIENTS = {"div", "div_", "truediv", "itruediv", "divide", "true_divide"}
_STACKS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}


def is_known_module(module: nn.Module) -> bool:
    """Return whether a module is bounded as a whole: its forward is that of a layer with a rule."""
    return _known_kind(module) is not None or _is_max_min(module)


def is_restless(network: nn.Module) -> bool:
    """Return whether a network has a layer whose weight changes when it is read again."""
    return any(_known_kind(module) is not None and _is_restless(module) for module in network.modules())


def _known_kind(module: nn.Module) -> type[nn.Module] | None:
    # A subclass that keeps forward (a parametrised layer, say) computes the same function; one that overrides it may not.
    kind = next((kind for kind in type(module).__mro__ if kind in _MODULES), None)
    return kind if kind is not None and computes_as(module, kind, "_conv_forward") else None


def _is_max_min(module: nn.Module) -> bool:
    return _qualified(module) in _MAX_MIN and computes_as(module, type(module))


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def value_of(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    """Return the value of a node that depends on the image.

    Raises:
        NoBoundError: why there is none.
    """
    if node.op == "placeholder":
        return Value("input")
    if node.op == "call_module":
        return _module_value(traced, node, values)
    if node.op == "call_function":
        return _function_value(traced, node, values)
    if node.op == "call_method":
        return _named_value(traced, node, values, str(node.target))
    raise NoBoundError(f"{node.op} of {node.target}")


def _first(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> tuple[Value, Shape]:
    """Return the value and shape of the only input that depends on the image, which must come first."""
    varying = [n for n in node.all_input_nodes if traced.info[n].varying]
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    if varying != [first]:
        raise NoBoundError("it combines several values that depend on the image")
    return values[varying[0]], traced.info[varying[0]].shape or ()


def _module_value(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    module = traced.root.get_submodule(str(node.target))
    value, shape = _first(traced, node, values)
    out = traced.info[node].shape or ()
    if isinstance(module, Preprocess):
        return _preprocess(module, value, shape, out)
    if _is_max_min(module):
        return value.through(1.0)
    kind = _known_kind(module)
    if kind is None:
        raise NoBoundError(traced.opaque.get(str(node.target).removeprefix("module."), _why_unknown(module)))
    rule, names, options = _MODULES[kind]
    settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if "weight" in settings and _is_restless(module):
        # orthogonium 0.0.4 runs one more step of its power iteration at each reading, in eval mode too.
        raise NoBoundError("its weight changes when it is read again; rsplugins.lipschitz.plain(network) fixes it")
    return rule(value, shape, out, {**options, **settings})


def _why_unknown(module: nn.Module) -> str:
    if any(kind in _MODULES for kind in type(module).__mro__):
        return (
            f"a hook, or a forward of its own, may change what this {type(module).__name__} computes; a weight that a hook "
            "computes can be one of torch.nn.utils.parametrizations instead"
        )
    return f"there is no rule for {type(module).__name__}"


def _is_restless(module: nn.Module, readings: int = 5) -> bool:
    first: Tensor | None = getattr(module, "weight", None)
    for _ in range(readings):
        again: Tensor | None = getattr(module, "weight", None)
        if first is None or again is None or again is first:
            return False
        if not torch.allclose(first, again, rtol=0.0, atol=0.0, equal_nan=True):
            return True
    return False


def _preprocess(module: Preprocess, value: Value, shape: Shape, out: Shape) -> Value:
    classifier = module.origin[0]
    if shape != out:
        frames = (1, shape[1] if len(shape) == 4 else shape[1] * shape[2])
        resized = rules.interpolate(
            value, (*frames, *shape[-2:]), (*frames, *out[-2:]), {"mode": "bilinear", "align_corners": False}
        )
        value = resized
    if classifier.std is None:
        return value
    factors = outward(1.0 / classifier.std.detach().cpu().double())
    return value.apply(Scale(factors.expand(out[1])))


def _is_torch(function: Any) -> bool:
    """Whether a function is the one of its name in torch or operator: a user's own may have the same name."""
    name = getattr(function, "__name__", "")
    return any(getattr(home, name, None) is function for home in _HOMES)


def _function_value(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    if node.target is operator.getitem:
        return _getitem(traced, node, values)
    known = _FUNCTIONS.get(node.target)
    if known is None:
        name = str(getattr(node.target, "__name__", node.target))
        if not _is_torch(node.target):
            raise NoBoundError(f"there is no rule for {name} of {getattr(node.target, '__module__', 'an unknown module')}")
        return _named_value(traced, node, values, name)
    rule, names, options = known
    value, shape = _first(traced, node, values)
    if len(node.args) > max(1, len(names)) and rule not in (
        rules.adaptive_avg_pool,
        rules.adaptive_max_pool,
        rules.softmax,
        rules.keep,
        rules.activation,
    ):
        raise NoBoundError("it is called with arguments that are not known here")
    settings = dict(zip(names[1:], (_static(traced, a) for a in node.args[1:]), strict=False))
    settings.update({key: _static(traced, a) for key, a in node.kwargs.items() if key != "input"})
    if settings.get("inplace") is not None:
        settings.pop("inplace")
    if options.get("dropout") and settings.get("training", True):
        raise NoBoundError("this dropout is active in eval mode")
    if options.get("name") == "clamp":
        settings = {}
    return rule(value, shape, traced.info[node].shape or (), {**options, **settings})


def _static(traced: Traced, argument: Any) -> Any:
    return fx.node.map_arg(argument, lambda n: traced.info[n].static)


def _getitem(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    value, shape = _first(traced, node, values)
    indices = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    plain = all(index is None or index is Ellipsis or isinstance(index, (int, slice)) for index in indices)
    if not plain and shape:
        raise NoBoundError("it selects entries by a list or a tensor, which may take one twice")
    return value.through(1.0)


def _named_value(traced: Traced, node: fx.Node, values: dict[fx.Node, Value], name: str) -> Value:
    out = traced.info[node].shape or ()
    if name in _SUMS:
        return _sum(traced, node, values, out)
    if name in _PRODUCTS or name in _QUOTIENTS:
        return _product(traced, node, values, out, divide=name in _QUOTIENTS)
    if name in _STACKS:
        return _stack(traced, node, values)
    value, shape = _first(traced, node, values)
    if name in _MOVES:
        if name == "view" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
            raise NoBoundError("it reads the bits of a tensor as numbers of another type")
        return value.through(1.0)
    if name in _REDUCTIONS:
        return rules.mean(value, shape, out, {"name": _REDUCTIONS[name]})
    if name == "expand":
        return value.through(rules.repeats(shape, out))
    bare = name.removesuffix("_")
    if bare in ("relu", "tanh", "sigmoid", "abs", "neg", "clamp", "hardtanh", "clip", "sin", "cos"):
        return rules.activation(value, shape, out, {"name": "clamp" if bare == "clip" else bare})
    raise NoBoundError(f"there is no rule for {name}")


def _operands(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> tuple[list[Any], list[Shape]]:
    if len(node.args) != 2:
        raise NoBoundError("it is called with arguments that are not known here")
    parts = [values[a] if isinstance(a, fx.Node) and traced.info[a].varying else _static(traced, a) for a in node.args]
    shapes = [(traced.info[a].shape or ()) if isinstance(a, fx.Node) else () for a in node.args]
    return parts, shapes


def _sum(traced: Traced, node: fx.Node, values: dict[fx.Node, Value], out: Shape) -> Value:
    parts, shapes = _operands(traced, node, values)
    alpha = node.kwargs.get("alpha", 1)
    if set(node.kwargs) - {"alpha"} or not isinstance(alpha, (int, float)):
        raise NoBoundError("it is called with arguments that are not known here")
    if alpha != 1 and isinstance(parts[1], Value):
        # torch.rsub(input, other, alpha) scales its first operand instead: take the larger factor for both.
        parts = [part.through(max(1.0, abs(float(alpha)))) if isinstance(part, Value) else part for part in parts]
    return rules.combine(parts, shapes, out)


def _product(traced: Traced, node: fx.Node, values: dict[fx.Node, Value], out: Shape, *, divide: bool) -> Value:
    parts, shapes = _operands(traced, node, values)
    varying = [i for i, part in enumerate(parts) if isinstance(part, Value)]
    gated = None if divide else _swish(traced, node)
    if gated is not None:
        return values[gated].through(SLOPES["silu"]() or math.inf)
    if node.kwargs or len(varying) != 1 or (divide and varying == [1]):
        raise NoBoundError("a product or quotient of two values that depend on the image has no global bound")
    factor = parts[1 - varying[0]]
    if divide:
        factor = outward(
            1.0
            / (factor.detach().cpu().double() if isinstance(factor, Tensor) else torch.tensor(float(factor), dtype=torch.float64))
        )
    return rules.multiply(parts[varying[0]], shapes[varying[0]], out, factor)


def _swish(traced: Traced, node: fx.Node) -> fx.Node | None:
    """Return x where the node is x * sigmoid(x), which is SiLU written out."""
    for x, gate in (node.args, node.args[::-1]):
        if not isinstance(gate, fx.Node) or gate.all_input_nodes != [x]:
            continue
        if gate.op == "call_module":
            sigmoid = _known_kind(traced.root.get_submodule(str(gate.target))) is nn.Sigmoid
        else:
            sigmoid = gate.target in ("sigmoid", torch.sigmoid, F.sigmoid)
        if sigmoid:
            return x if isinstance(x, fx.Node) else None
    return None


def _stack(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    if isinstance(parts, fx.Node):
        return values[parts].through(1.0)  # all the pieces of one value, each once
    if not isinstance(parts, (tuple, list)):
        raise NoBoundError("it is called with arguments that are not known here")
    return rules.concatenate([values[p] for p in parts if isinstance(p, fx.Node) and traced.info[p].varying])
