"""What a model remembers between calls, seen directly: buffers, attributes, and the variables that its code reads.

A forward pass that leaves any of them another than it found it is no function of its input. What is looked at: parameters and
buffers (by their bytes); plain attributes of every layer and of what they hold; attributes of the layers' classes; variables that
their methods, hooks and helper functions close over, read as globals, or keep as defaults; the global random generators. What is
kept in C, in files, in other processes, or in the clock is not seen here.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import inspect
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rsplugins.checks import named_layer
from rsplugins.classifier import checksum
from rsplugins.double import dense_parts, sizes
from rsplugins.watch.state import LIBRARIES

_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
"""What torch keeps in a module, hooks and layers among it, which are looked at by name."""
_KNOWN = frozenset(sys.stdlib_module_names) | LIBRARIES | {"functorch", "pydantic", "pydantic_core"}
"""Packages whose functions and classes keep no state of a model; what a model keeps in their objects is looked at."""
_REDUCIBLE = frozenset({"builtins", "itertools", "collections", "array", "random", "_random", "numpy", "_io"})
_DEEPEST = 10
_LONGEST = 512
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size, slice, range)

Seen = dict[str, Any]
"""What was found, by the words in which an error names it."""


class _Known(NamedTuple):
    tensor: Tensor
    key: tuple[Any, ...]
    digest: tuple[Any, ...]


class Watch:
    """Looks at what a function can remember.

    Args:
        function: a module, or any callable; of a plain function its closure and globals are followed.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> watch = Watch(layer)
        >>> before, _, after = watch.look(), layer(torch.rand(4, 2)), watch.look()
        >>> changed(before, after)[0]
        "buffer 'running_mean' of 'the model itself' (BatchNorm1d)"
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._found = _Found()
        self._found.reach(function, "")
        self._digests: dict[int, _Known] = {}
        self.lasting: set[str] = set()
        """What a state dict would hold: weights, which no forward pass may change, the first one included."""
        self.passing: set[tuple[str, str]] = set()
        """Layers and attributes that hold what the last pass left and no pass reads before it sets it: they are not looked at."""

    def look(self, *, fresh: bool = True) -> Seen:
        """Return what is there now.

        Args:
            fresh: read the bytes of every tensor; otherwise those whose version counter has not moved are taken for the same.
        """
        reader = _Reader({} if fresh else self._digests)
        seen: Seen = {}
        for name, layer in self._found.modules:
            said = named_layer(name, layer)
            for key, value in _tensors(layer):
                word = f"{'buffer' if key in layer._buffers else 'parameter'} {key!r} of {said}"
                seen[word] = reader.token(value)
                if key not in layer._non_persistent_buffers_set:
                    self.lasting.add(word)
            for key, value in list(vars(layer).items()):
                if key not in _MACHINERY and (name, key) not in self.passing:
                    seen[f"attribute {key!r} of {said}"] = reader.token(value)
        for said, holder, key in self._found.places:
            seen[said] = reader.token(_read(holder, key))
        self._digests = reader.digests
        return seen


def changed(before: Seen, after: Seen) -> list[str]:
    """Return the words for what differs, in the order in which it is looked at: tensors of a layer, then its attributes."""
    return [said for said in {**before, **after} if before.get(said, _ABSENT) != after.get(said, _ABSENT)]


def generators(device: torch.device) -> Seen:
    """Return the states of the global random generators."""
    numpy = np.random.get_state()
    found = {
        "the random generator of torch": bytes(torch.get_rng_state().numpy().data),
        "the random generator of Python": random.getstate(),
        "the random generator of numpy": [bytes(part.data) if isinstance(part, np.ndarray) else part for part in numpy],
    }
    if device.type == "cuda":
        found[f"the random generator of torch on {device}"] = bytes(torch.cuda.get_rng_state(device).numpy().data)
    return found


_ABSENT = ("absent",)


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters(recurse=False, remove_duplicate=False)
    yield from layer.named_buffers(recurse=False, remove_duplicate=False)


def _read(holder: Any, key: str) -> Any:
    try:
        return holder[key] if isinstance(holder, Mapping) else getattr(holder, key)
    except Exception:  # an empty cell, or a property of somebody's that fails
        return _ABSENT


def _is_known(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "") or "").partition(".")[0] in _KNOWN


def _is_engine(thing: Any) -> bool:
    """Whether something is a certifier or a part of this package, which keeps books of its own while a model is sampled."""
    loaded = sys.modules.get("rsplugins.certifier")  # not imported: it needs pydantic, which a machine for training may lack
    by_plugin = loaded is not None and isinstance(thing, loaded.Certifier)
    return by_plugin or type(thing).__module__.partition(".")[0] == "rsplugins"


class _Found:
    """Layers, and places outside of layers, that the code of a function can reach."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, nn.Module]] = []
        self.places: list[tuple[str, Any, str]] = []
        self._met: dict[int, Any] = {}  # kept alive, so that no number is used twice

    def reach(self, thing: Any, owner: str, depth: int = 0) -> None:
        """Follow whatever it is to where state may be."""
        if isinstance(thing, (*_PLAIN, Tensor, np.ndarray)) or depth > _DEEPEST or id(thing) in self._met:
            return
        self._met[id(thing)] = thing
        if isinstance(thing, nn.Module):
            self._module(thing, owner)
        elif isinstance(thing, type):
            self._class(thing, owner)
        elif isinstance(thing, types.FunctionType | types.MethodType | functools.partial | staticmethod | classmethod | property):
            self._callable(thing, owner, depth)
        elif inspect.isfunction(wrapped := inspect.getattr_static(thing, "__wrapped__", None)):
            self.reach(wrapped, owner, depth + 1)
        elif isinstance(thing, Mapping | Sequence | collections.deque | set | frozenset):
            self._all(thing.values() if isinstance(thing, Mapping) else thing, owner, depth)
        elif hasattr(thing, "__dict__") and not isinstance(thing, types.ModuleType) and not _is_known(type(thing)):
            if not _is_engine(thing):
                self.reach(type(thing), owner, depth + 1)
            self._all(vars(thing).values(), owner, depth)

    def _all(self, values: Iterable[Any], owner: str, depth: int) -> None:
        for value in list(islice(values, _LONGEST)):
            self.reach(value, owner, depth + 1)

    def _module(self, module: nn.Module, owner: str) -> None:
        for name, layer in module.named_modules():
            path = ".".join(part for part in (owner, name) if part)
            self._met[id(layer)] = layer
            self.modules.append((path, layer))
            for key, value in list(vars(layer).items()):
                hooks = key in ("_forward_hooks", "_forward_pre_hooks")
                if hooks and value:
                    self._place(f"a hook of {named_layer(path, layer)}", vars(layer), key)
                if hooks or key not in _MACHINERY:
                    self.reach(value, f"{path}.{key}" if path else key, 1)
            self.reach(type(layer), path)

    def _class(self, kind: type, owner: str) -> None:
        for base in kind.__mro__:
            if _is_known(base):
                continue
            for key, value in list(vars(base).items()):
                if isinstance(value, types.FunctionType | staticmethod | classmethod | property):
                    self.reach(value, owner)
                elif not key.startswith("__") and not inspect.isdatadescriptor(value):
                    self._follow(f"class attribute {key!r} of {base.__qualname__}", vars(base), key, 0)
            self._place(f"a class attribute of {base.__qualname__}", base, "__dict__")  # those that are not there yet

    def _callable(self, thing: Any, owner: str, depth: int) -> None:
        if isinstance(thing, types.MethodType):
            self._follow(f"the object of {thing.__qualname__}()", thing, "__self__", depth)
            self.reach(thing.__func__, owner, depth + 1)
        elif isinstance(thing, functools.partial):
            for key in ("args", "keywords"):
                self._follow(f"an argument of {getattr(thing.func, '__qualname__', 'a partial')}()", thing, key, depth)
            self.reach(thing.func, owner, depth + 1)
        elif isinstance(thing, property):
            self.reach([part for part in (thing.fget, thing.fset) if part], owner, depth + 1)
        elif isinstance(thing, staticmethod | classmethod):
            self.reach(thing.__func__, owner, depth + 1)
        else:
            self._function(thing, depth)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        name = f"{function.__qualname__}()"
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._follow(f"variable {key!r} that {name} closes over", cell, "cell_contents", depth)
        if _is_known(function):
            return  # of a decorator of torch only what it is wrapped around
        for key in ("__defaults__", "__kwdefaults__"):
            self._follow(f"a default value of {name}", function, key, depth)
        self._follow(f"an attribute of {name}", function, "__dict__", depth)
        names = set(_names(function.__code__))
        for key in sorted(names & function.__globals__.keys()):
            value = function.__globals__[key]
            if isinstance(value, types.ModuleType):
                if value.__name__.partition(".")[0] not in _KNOWN:
                    for inner in sorted(names & vars(value).keys()):
                        self._follow(f"variable {value.__name__}.{inner}", vars(value), inner, depth)
            else:
                self._follow(f"global variable {key!r} that {name} reads", function.__globals__, key, depth)
        # A name that the function assigns may not be there yet.
        for key in sorted(_assigned(function.__code__) - function.__globals__.keys()):
            self._place(f"global variable {key!r} that {name} sets", function.__globals__, key)

    def _follow(self, said: str, holder: Any, key: str, depth: int) -> None:
        value = _read(holder, key)
        if not isinstance(value, types.FunctionType | type | nn.Module | types.ModuleType):
            self._place(said, holder, key)
        self.reach(value, key, depth + 1)

    def _place(self, said: str, holder: Any, key: str) -> None:
        same = sum(known.startswith(said) for known, _, _ in self.places)
        self.places.append((f"{said} ({same + 1})" if same else said, holder, key))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    for each in _codes(code):
        yield from each.co_names


def _assigned(code: types.CodeType) -> set[str]:
    import dis

    return {str(line.argval) for each in _codes(code) for line in dis.get_instructions(each) if line.opname == "STORE_GLOBAL"}


class _Reader:
    """Turns values into something that is equal where they say the same."""

    def __init__(self, known: dict[int, _Known]) -> None:
        self._known = known
        self.digests: dict[int, _Known] = {}

    def token(self, value: Any, depth: int = 0) -> Any:
        """Return the token of one value; of what cannot be read, its type alone."""
        if isinstance(value, _PLAIN):
            return type(value).__name__, repr(value)  # a NaN is not equal to itself
        if isinstance(value, Tensor):
            return self._tensor(value)
        kind = type(value).__qualname__
        if depth > _DEEPEST or isinstance(value, nn.Module | types.ModuleType | type):
            return kind
        if isinstance(value, Mapping):
            pairs = zip(value.items(), range(_LONGEST), strict=False)
            return kind, len(value), [(self.token(k, depth + 1), self.token(v, depth + 1)) for (k, v), _ in list(pairs)]
        if isinstance(value, set | frozenset):
            return kind, len(value), sorted(repr(self.token(each, depth + 1)) for each in list(value)[:_LONGEST])
        if isinstance(value, Sequence | collections.deque) and not isinstance(value, bytearray):
            ends = list(value) if len(value) <= _LONGEST else [*_first(value, _LONGEST // 2), *_first(reversed(value), 64)]
            return kind, len(value), [self.token(each, depth + 1) for each in ends]
        return kind, self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Any:
        if isinstance(value, np.ndarray):
            content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
            return value.dtype.str, value.shape, content
        if isinstance(value, torch.Generator):
            return bytes(value.get_state().numpy().data)
        if isinstance(value, np.random.Generator):
            return repr(value.bit_generator.state)
        if isinstance(value, contextvars.ContextVar):
            return self.token(value.get(None), depth + 1)
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return None if frame is None else (frame.f_lasti, self.token(dict(frame.f_locals), depth + 1))
        return self._parts(value, depth)

    def _parts(self, value: Any, depth: int) -> Any:
        home = type(value).__module__.partition(".")[0]
        if home == "logging" or _is_engine(value):
            return ""
        if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
            return getattr(value, "__qualname__", "")
        slots = [name for base in type(value).__mro__ for name in _slots(base) if hasattr(value, name)]
        parts = {name: _read(value, name) for name in slots} | dict(getattr(value, "__dict__", {}))
        found = self.token(parts, depth + 1) if parts else ""
        return (found, self.token(_reduced(value), depth + 1)) if home in _REDUCIBLE else found

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        version = None if tensor.is_inference() else tensor._version
        key = (version, sizes(tensor), _pointer(tensor))
        known = self._known.get(id(tensor)) or self.digests.get(id(tensor))
        if known is None or known.tensor is not tensor or known.key != key or version is None:
            known = _Known(tensor, key, _digest(tensor))
        self.digests[id(tensor)] = known
        return known.digest


def _first(values: Any, count: int) -> list[Any]:
    return [value for value, _ in zip(values, range(count), strict=False)]


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if name not in ("__dict__", "__weakref__"))


def _reduced(value: Any) -> Any:
    """Return what an iterator, a counter or a generator of random numbers would be saved as."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, whose repr says as much
            return value.__reduce_ex__(2)[1:]
    except Exception:
        return repr(value)


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # no storage of its own: sparse, or a wrapper
        return 0


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        content = tuple(int(checksum(part)) for part in dense_parts(tensor))
    return "tensor", str(tensor.dtype), sizes(tensor), content
