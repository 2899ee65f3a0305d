"""The arguments of one call: bound to names, each looked at by the call's rule, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rsplugins.lipschitz.composition import Value
from rsplugins.lipschitz.tracing import Info

Shape = tuple[int, ...]

_ALSO = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}
"""Names of NumPy that PyTorch takes for its own."""


class NoBoundError(Exception):
    """Raised by a rule: why this operation has no bound."""


@dataclass(frozen=True)
class Operand:
    """One side of a sum or product.

    Attributes:
        value: where it depends on the image, else None.
        shape: of a tensor; () for a number.
        constant: where it does not depend on the image.
    """

    value: Value | None
    shape: Shape
    constant: Any = None


@dataclass(eq=False)
class Call:
    """A call with its arguments by name; what a rule leaves unread is refused, so that no rule can forget an argument.

    Attributes:
        name: as the user may have written it.
        node: of the graph.
        info: by node, what it returned.
        values: by node, what is known of it.
        arguments: by name, as they stand in the graph: those that were given, or all settings of a layer.
        defaults: by name: a setting of a layer that has this value need not be read.
        options: what the table says of this call.
        run: carries the call out with a tensor in place of the input.
        read: the names of arguments that the rule has looked at.
    """

    name: str
    node: fx.Node
    info: Mapping[fx.Node, Info]
    values: Mapping[fx.Node, Value]
    arguments: dict[str, Any]
    defaults: Mapping[str, Any]
    options: Mapping[str, Any]
    run: Callable[[Tensor], Any]
    read: set[str] = field(default_factory=set)

    @property
    def out(self) -> Shape:
        """Shape of the result; a rule that reads it is about one tensor."""
        shape = self.info[self.node].shape
        if shape is None:
            raise NoBoundError(f"{self.name} returns something else than one tensor")
        return shape

    def source(self, name: str = "input") -> tuple[Value, Shape]:
        """Return the value and shape of an argument that is a tensor and depends on the image."""
        operand = self.operand(name)
        if operand.value is None:
            raise NoBoundError(f"the {name} of {self.name} does not depend on the image, but another argument does")
        return operand.value, operand.shape

    def operand(self, name: str) -> Operand:
        """Return an argument that is a tensor or a number."""
        argument = self._take(name, None)
        if isinstance(argument, fx.Node) and self.info[argument].varying:
            shape = self.info[argument].shape
            if shape is None:
                raise NoBoundError(f"the {name} of {self.name} is not one tensor")
            return Operand(self.values[argument], shape)
        constant = self.real(name, argument)
        if constant is None:
            raise NoBoundError(f"{self.name} is called without {name}")
        return Operand(None, tuple(constant.shape) if isinstance(constant, Tensor) else (), constant)

    def real(self, name: str, argument: Any) -> int | float | Tensor | None:
        """Return an argument, or a part of it, that is None or real and does not depend on the image."""
        constant = self._static(name, argument)
        if not isinstance(constant, (int, float, Tensor, type(None))) or (isinstance(constant, Tensor) and constant.is_complex()):
            raise NoBoundError(f"{self.name} is called with {name}={_text(constant)}, which is no number or tensor of numbers")
        return constant

    def constant(self, name: str, default: Any = None) -> Any:
        """Return an argument that does not depend on the image."""
        return self._static(name, self._take(name, default))

    def number(self, name: str, default: float) -> float:
        """Return an argument that is a finite number."""
        value = self.constant(name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise NoBoundError(f"{self.name} is called with {name}={_text(value)}, which is no finite number")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """Return an argument that must have one of some values, the first of which it has where it is not given."""
        value = self.constant(name, allowed[0])
        if not any(_is(value, one) for one in allowed):
            raise NoBoundError(f"{self.name} is called with {name}={_text(value)}, which has no bound here")
        return value

    def precise(self) -> None:
        """Check that no argument makes the result coarser than float32, which would round it in steps."""
        self.only("dtype", None, torch.float32, torch.float64)

    def ignore(self, *names: str) -> None:
        """Leave arguments out that change nothing, or nothing but the shape of the result, which the rule reads."""
        for name in names:
            self.constant(name)

    def given(self) -> list[str]:
        """Return the names of the arguments."""
        return list(self.arguments)

    def finish(self) -> None:
        """Check that each argument was looked at.

        Raises:
            NoBoundError: one was not.
        """
        for name, argument in self.arguments.items():
            if name not in self.read and not (name in self.defaults and _is(argument, self.defaults[name])):
                raise NoBoundError(f"{self.name} is called with {name}={_text(argument)}, which its rule does not cover")

    def _take(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self.arguments.get(name, default)

    def _static(self, name: str, argument: Any) -> Any:
        return static(argument, self.info, f"the {name} of {self.name}")


def static(argument: Any, info: Mapping[fx.Node, Info], what: str) -> Any:
    """Return an argument with the nodes in it replaced by their values.

    Raises:
        NoBoundError: one of them depends on the image.
    """

    def value(node: fx.Node) -> Any:
        if info[node].varying:
            raise NoBoundError(f"{what} depends on the image")
        return info[node].static

    return fx.node.map_arg(argument, value)


def bind(name: str, parameters: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, whether they were given by position or by keyword.

    Args:
        name: of the call.
        parameters: names in order; those behind ``*`` are given by keyword alone.
        args: by position.
        kwargs: by keyword.

    Raises:
        NoBoundError: an argument has no place, or is given twice.

    Example:
        >>> bind("add", "input other * alpha", (1, 2), {"alpha": 3})
        {'input': 1, 'other': 2, 'alpha': 3}
    """
    before, _, after = parameters.partition("*")
    names = before.split()
    if len(args) > len(names):
        raise NoBoundError(f"{name} is called with {len(args)} arguments by position, of which {len(names)} are covered")
    bound = dict(zip(names, args, strict=False))
    for key, argument in kwargs.items():
        known = _ALSO.get(key, key)
        if key == "out" and argument is None:
            continue
        if known not in (*names, *after.split()):
            raise NoBoundError(f"{name} is called with {key}={_text(argument)}, which its rule does not cover")
        if known in bound:
            raise NoBoundError(f"{name} is called with {key} twice")
        bound[known] = argument
    return bound


def _is(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, Tensor) and bool(value == default)


def _text(value: Any) -> str:
    if isinstance(value, (Tensor, fx.Node)):
        return "a tensor"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
