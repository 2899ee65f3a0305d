"""Sizes while torch.fx traces: numbers, since the size of the image is fixed, but for the batch's, which stays open."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate


class Sized(fx.Proxy):
    """A stand-in for a value that knows the value's shape where it could be worked out; the batch, dimension 0, is a stand-in."""

    example: Any = None

    @property
    def shape(self) -> Any:
        """The sizes: numbers behind a stand-in; a stand-in for all of them where they are not known."""
        if not isinstance(self.example, Tensor):
            return self.__getattr__("shape")
        return self._sizes(lambda: operator.getitem(self.__getattr__("shape"), 0))

    @property
    def ndim(self) -> Any:
        """The number of dimensions."""
        return self.example.dim() if isinstance(self.example, Tensor) else self.__getattr__("ndim")

    def dim(self) -> Any:
        """The number of dimensions."""
        return self.example.dim() if isinstance(self.example, Tensor) else self.__getattr__("dim")()

    def size(self, dim: Any = None) -> Any:
        """As :meth:`torch.Tensor.size`."""
        if not isinstance(self.example, Tensor) or not (dim is None or isinstance(dim, int)):
            return self.__getattr__("size")(*(() if dim is None else (dim,)))
        if dim is None:
            return self._sizes(lambda: self.__getattr__("size")(0))
        whole = self.example.dim()
        if dim in (0, -whole):
            return self.__getattr__("size")(dim)
        return self.example.size(dim)

    def expand_as(self, other: Any) -> Any:
        """As :meth:`torch.Tensor.expand_as`: the other tensor gives its sizes alone."""
        return (
            self.expand(*other.shape) if isinstance(getattr(other, "example", None), Tensor) else self._method("expand_as", other)
        )

    def view_as(self, other: Any) -> Any:
        """As :meth:`torch.Tensor.view_as`."""
        return self.view(*other.shape) if isinstance(getattr(other, "example", None), Tensor) else self._method("view_as", other)

    def _method(self, name: str, other: Any) -> Any:
        return self.__getattr__(name)(other)

    def _sizes(self, batch: Callable[[], Any]) -> Any:
        sizes = tuple(self.example.shape)
        return (batch(), *sizes[1:]) if sizes else self.example.shape


class Examples:
    """Carries a value without numbers, of a batch of one, through a graph while it is traced.

    Only functions and layers of torch are run: code of others may keep what it is given, and such a value must not be found in a
    model afterwards. Nothing is known of what that code returns.

    Args:
        find: from the name of a module, parameter or buffer to it.
    """

    def __init__(self, find: Callable[[str], Any]) -> None:
        self.running = False
        self._find = find
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def image(self, size: tuple[int, ...]) -> Tensor:
        """Return the example of the image."""
        with self._mode:
            return torch.empty((1, *size))

    def of(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what a call returns for the examples of its arguments, or None where nothing is known of it."""
        if self.running:
            return None
        self.running = True
        try:
            with self._mode, torch.no_grad():
                given, named = map_aggregate(args, _example), map_aggregate(kwargs, _example)
                if kind == "get_attr":
                    return self._find(str(target))
                if kind == "call_module":
                    layer = self._find(str(target))
                    return layer.forward(*given, **named) if _is_plain(layer) else None
                if kind == "call_method":
                    return getattr(given[0], str(target))(*given[1:], **named)
                return target(*given, **named) if kind == "call_function" and _is_torch(target) else None
        except Exception:
            return None
        finally:
            self.running = False


def _is_torch(thing: Any) -> bool:
    home = str(getattr(thing, "__module__", None) or "torch").partition(".")[0]
    return home in ("torch", "_operator", "builtins", "math")


def _is_plain(module: nn.Module) -> bool:
    """Whether a module and all in it are layers of torch, or say of themselves that they keep nothing, without hooks."""
    return all(
        (_is_torch(type(layer)) or getattr(layer, "keeps_nothing", False))
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
        for layer in module.modules()
    )


def _example(value: Any) -> Any:
    if isinstance(value, fx.proxy.Attribute):
        return getattr(_example(value.root), value.attr)
    if not isinstance(value, fx.Proxy):
        return value
    found = getattr(value, "example", None) if isinstance(value, Sized) else None
    if found is None:
        raise LookupError(value.node.name)
    return found
