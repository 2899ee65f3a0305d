"""What a model keeps in Python between two calls: attributes of its layers, and what its functions see outside themselves."""

from __future__ import annotations

import collections
import contextvars
import inspect
import itertools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsplugins.watch.source import Code
from rsplugins.watch.taint import digest

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.Size, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
LIBRARIES = {
    "torch",
    "rsplugins",
    "torchvision",
    "timm",
    "tqdm",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "scipy",
    "einops",
    "logging",
    "builtins",
    "typing",
    "functools",
    "abc",
}
_DEPTH, _ITEMS = 4, 1000
_SKIPPED = {"_parameters", "_modules"}

State = dict[str, Any]


def snapshot(module: nn.Module, depends: Callable[[Tensor], bool]) -> State:
    """Return what a model keeps, in a form that two calls can be compared by.

    Args:
        module: the model.
        depends: whether a tensor depends on pixels: such a one may be kept, and using it in a later call is refused elsewhere.
    """
    reader = _Reader(depends)
    found: State = {}
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key not in _SKIPPED:
                found[f"{name}.{key}".lstrip(".")] = reader.plain(value)
    for label, value in _outside(module):
        found[label] = reader.plain(value)
    return found


def changed(module: nn.Module, before: State, after: State) -> tuple[str, str] | None:
    """Return the first thing that differs between two snapshots and may be read, with the line that sets it where it is found."""
    names = [name for name in dict.fromkeys([*after, *before]) if before.get(name) != after.get(name)]
    if not names:
        return None
    code = Code(reachable(module))
    found = next((name for name in names if code.reads(name.rpartition(".")[2])), None)
    return None if found is None else (found, code.line_that_sets(found.rpartition(".")[2]))


class _Reader:
    def __init__(self, depends: Callable[[Tensor], bool]) -> None:
        self._depends = depends

    def plain(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, Tensor):
            return "pixels" if self._depends(value) else digest(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return (value.shape, value.tobytes() if value.dtype != object else repr(value))
        if isinstance(value, (random.Random, torch.Generator)):
            return repr(value.getstate() if isinstance(value, random.Random) else value.get_state().tolist())
        if isinstance(value, np.random.Generator):
            return repr(value.bit_generator.state)
        if type(value).__module__ == itertools.__name__:
            return repr(value)
        if isinstance(value, contextvars.ContextVar):
            return self.plain(value.get(None), depth + 1)
        return self._nested(value, depth)

    def _nested(self, value: Any, depth: int) -> Any:
        kind = type(value).__qualname__
        if depth >= _DEPTH or isinstance(value, (nn.Module, type, types.ModuleType)):
            return kind
        if isinstance(value, _SEQUENCES):
            items = value if not isinstance(value, (set, frozenset)) else sorted(value, key=repr)
            return kind, len(value), [self.plain(item, depth + 1) for item in itertools.islice(items, _ITEMS)]
        if isinstance(value, dict):
            pairs = itertools.islice(value.items(), _ITEMS)
            return kind, len(value), [(self.plain(key, depth + 1), self.plain(item, depth + 1)) for key, item in pairs]
        if callable(value) or type(value).__module__.partition(".")[0] in LIBRARIES:
            return kind
        return kind, [(key, self.plain(item, depth + 1)) for key, item in getattr(value, "__dict__", {}).items()]


def _outside(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the class attributes, globals, closures, defaults and own attributes that the model's functions can see."""
    for kind in _classes(module):
        yield from _of_class(kind)
    for function in reachable(module):
        for label, value in _of_function(function):
            if isinstance(value, type) and not _is_library(value):
                yield from _of_class(value)
            elif not isinstance(value, types.FunctionType):
                yield label, value


def reachable(module: nn.Module) -> list[types.FunctionType]:
    """Return the functions of a model's classes, objects and hooks, and those that they name, but for the libraries'."""
    values = [value for kind in _classes(module) for value in vars(kind).values()]
    for layer in module.modules():
        values += [*vars(layer).values(), *layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    found: dict[int, types.FunctionType] = {}
    stack = [function for value in values for function in _functions(value)]
    while stack:
        function = stack.pop()
        if id(function) not in found and not _is_library(function):
            found[id(function)] = function
            stack += [inner for _, value in _of_function(function) for inner in _functions(value)]
    return list(found.values())


def _classes(module: nn.Module) -> list[type]:
    kinds = {kind for layer in module.modules() for kind in type(layer).__mro__ if not _is_library(kind)}
    return sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))


def _is_library(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in LIBRARIES


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    for key, value in list(vars(kind).items()):
        if not key.startswith("__") and not callable(value):
            yield f"{kind.__qualname__}.{key}", value


def _functions(value: Any) -> Iterator[types.FunctionType]:
    # Asked of what is stored, not of the object: a proxy of torch.fx, which tracing may leave behind, has every attribute.
    while not isinstance(value, types.FunctionType) and inspect.getattr_static(value, "__wrapped__", None) is not None:
        value = value.__wrapped__
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    if isinstance(value, types.FunctionType):
        yield value


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name in _names(function.__code__):
        if name in function.__globals__ and name != "__builtins__":
            yield f"{function.__module__}.{name}", function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"{function.__qualname__}.{name}", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield f"{function.__qualname__}.__defaults__", (function.__defaults__, function.__kwdefaults__)
    yield f"{function.__qualname__}.__dict__", {key: value for key, value in vars(function).items() if key != "__wrapped__"}
    yield from ((f"{function.__qualname__}.__wrapped__", function.__wrapped__) for _ in [0] if hasattr(function, "__wrapped__"))


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
