"""From a node of a graph to the rule that bounds it: modules, functions and methods."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rsplugins.lipschitz import rules
from rsplugins.lipschitz.arguments import Call, NoBoundError, bind, static
from rsplugins.lipschitz.composition import Scale, Value, outward
from rsplugins.lipschitz.layers import changes_when_read, is_max_min, known_kind
from rsplugins.lipschitz.products import Product
from rsplugins.lipschitz.tables import ANY, FUNCTIONS, METHODS, MODULES, Entry
from rsplugins.lipschitz.tracing import Preprocess, Traced

_UNREADABLE = (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AttributeError)


_WITHIN_ONE = {"sigmoid", "hardsigmoid", "tanh", "softmax", "sigmoid_", "tanh_"}
_WITHIN_ONE_FUNCTIONS = (torch.sigmoid, torch.tanh, torch.softmax, F.sigmoid, F.tanh, F.softmax, F.hardsigmoid)
_WITHIN_ONE_LAYERS = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax)
_MOVES = {"view", "reshape", "expand", "unsqueeze", "squeeze", "flatten", "permute", "transpose", "contiguous", "clone"}


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
        entry = FUNCTIONS.get(node.target) if callable(node.target) else None
        name = str(getattr(node.target, "__name__", node.target))
        if node.target is F.scaled_dot_product_attention:
            raise NoBoundError(_ATTENTION)
        if entry is None:
            raise NoBoundError(f"there is no rule for {name} of {getattr(node.target, '__module__', None) or 'torch'}")
        return _bounded(traced, node, values, entry, name)
    if node.op == "call_method" and node.target in METHODS:
        return _bounded(traced, node, values, METHODS[str(node.target)], f".{node.target}")
    raise NoBoundError(f"there is no rule for {node.target}")


def _bounded(traced: Traced, node: fx.Node, values: dict[fx.Node, Value], entry: Entry, name: str) -> Value:
    if entry.parameters == ANY:
        arguments = {**{_place(i): argument for i, argument in enumerate(node.args)}, **node.kwargs}
        source = next((key for key, argument in arguments.items() if _varies(traced, argument)), "input")
        arguments = {"input": arguments.pop(source, None), **arguments}
    else:
        arguments = bind(name, entry.parameters, node.args, node.kwargs)
    options = {**entry.options, "swish": functools.partial(_swish, traced)}
    options["product"] = functools.partial(_product, traced, node)
    return _apply(entry, Call(name, node, traced.info, values, arguments, {}, options, _runner(traced, node)))


def _place(index: int) -> str:
    return f"argument {index}" if index else "input"


def _varies(traced: Traced, argument: Any) -> bool:
    return isinstance(argument, fx.Node) and traced.info[argument].varying


def _apply(entry: Entry, call: Call) -> Value:
    try:
        value = entry.rule(call)
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise NoBoundError(f"its rule cannot read how {call.name} is called: {reason}") from error
    call.finish()
    return value


def _runner(traced: Traced, node: fx.Node) -> Callable[[Tensor], Any]:
    """Return a function that carries a call out, on the CPU, with a tensor in place of what depends on the image."""

    def run(tensor: Tensor) -> Any:
        def value(argument: fx.Node) -> Any:
            if traced.info[argument].varying:
                return tensor
            kept = static(argument, traced.info, "an argument")
            return kept.cpu() if isinstance(kept, Tensor) else kept

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = traced.root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    return run


def _module_value(traced: Traced, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    module = traced.root.get_submodule(str(node.target))
    name = type(module).__name__
    call = Call(name, node, traced.info, values, bind(name, "input", node.args, node.kwargs), {}, {}, _runner(traced, node))
    if isinstance(module, Preprocess):
        return _preprocess(module, call)
    if is_max_min(module):
        return call.source()[0].through(1.0)
    kind = known_kind(module)
    if kind is None:
        raise NoBoundError(traced.opaque.get(str(node.target).removeprefix("module."), _why_unknown(module)))
    entry = MODULES[kind]
    settings, defaults = _settings(module, kind, entry)
    if "weight" in settings and changes_when_read(module):
        # orthogonium 0.0.4 runs one more step of its power iteration at each reading, in eval mode too.
        raise NoBoundError("its weight changes when it is read again; rsplugins.lipschitz.plain(network) fixes it")
    call.arguments.update(settings)
    call.defaults, call.options = defaults, entry.options
    return _apply(entry, call)


def _settings(module: nn.Module, kind: type[nn.Module], entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a layer was made with and the attributes that its rule reads, and the defaults of its constructor."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    extra = entry.parameters.replace(ANY, "").split()
    settings = {name: getattr(module, name) for name in dict.fromkeys([*named, *extra]) if hasattr(module, name)}
    return settings, {p.name: p.default for p in parameters}


_ATTENTION = "dot-product self-attention is not Lipschitz (Kim, Papamakarios, Mnih, ICML 2021)"


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    if any(kind in MODULES for kind in type(module).__mro__):
        return (
            f"a hook, or a forward of its own, may change what this {type(module).__name__} computes; a weight that a hook "
            "computes can be one of torch.nn.utils.parametrizations instead"
        )
    return f"there is no rule for {type(module).__name__}"


def _preprocess(module: Preprocess, call: Call) -> Value:
    classifier = module.origin[0]
    value, shape = call.source()
    out = call.out
    if shape != out:
        frames = (1, shape[1] if len(shape) == 4 else shape[1] * shape[2])
        value = value.apply(rules.resizing((*frames, *shape[-2:]), (*frames, *out[-2:]), "bilinear", False, None))
    if classifier.std is None:
        return value
    factors = outward(1.0 / classifier.std.detach().cpu().double())
    return value.apply(Scale(factors.expand(out[1])))


def _product(traced: Traced, node: fx.Node) -> Product | None:
    """Return what is known of the two factors of a product; None where their values at the grey image are not."""
    known = traced.products.get(node)
    if known is None:
        return None
    pairs = zip(known, node.args, strict=True)
    first, second = (replace(factor, within=_bound_of_values(traced.root, source)) for factor, source in pairs)
    return Product(first, second, traced.reach)


def _bound_of_values(root: nn.Module, node: Any) -> float:
    """Return a bound of the magnitude of a node's values on all images: 1 behind a sigmoid and the like, else infinity."""
    while isinstance(node, fx.Node):
        if node.op == "call_method" and node.target in _MOVES and node.args:
            node = node.args[0]
            continue
        if node.op == "call_method":
            known = node.target in _WITHIN_ONE
        elif node.op == "call_module":
            known = known_kind(root.get_submodule(str(node.target))) in _WITHIN_ONE_LAYERS
        else:
            known = node.op == "call_function" and node.target in _WITHIN_ONE_FUNCTIONS
        return 1.0 if known else math.inf
    return math.inf


def _swish(traced: Traced, first: Any, second: Any) -> fx.Node | None:
    """Return x where two factors are x and sigmoid(x): their product is SiLU written out."""
    for x, gate in ((first, second), (second, first)):
        if not isinstance(gate, fx.Node) or gate.all_input_nodes != [x]:
            continue
        if gate.op == "call_module":
            sigmoid = known_kind(traced.root.get_submodule(str(gate.target))) is nn.Sigmoid
        else:
            sigmoid = gate.target in ("sigmoid", torch.sigmoid, F.sigmoid)
        if sigmoid:
            return x if isinstance(x, fx.Node) else None
    return None
