"""Mistakes that leave a model running and its numbers wrong, told from the operations that it runs; said as warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rsplugins.errors import warn

_SAME = ("view", "_unsafe_view", "reshape", "clone", "detach", "alias", "_to_copy", "contiguous", "expand", "lift_fresh", "copy_")
_SHIFT, _SCALE = ("sub", "sub_", "rsub", "add", "add_"), ("div", "div_", "mul", "mul_")
_PROBABILITIES = {"_softmax": "softmax", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}


class _Ends(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is done to the input first, and what made each tensor.

    Attributes:
        first: the operations by channel that come before any other on the input, in words.
        made: the operation behind each tensor, by its number.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: list[str] = []
        self.made: dict[int, str] = {}
        self._channels = x.shape[1]
        self._input: dict[int, Tensor] = {id(x): x}
        self._alive: list[Any] = []  # so that no number is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.__name__).split(".")[0]
        if isinstance(out, Tensor):
            self._alive.append(out)
            source = args[0] if args else None
            if name in _SAME:
                self.made[id(out)] = self.made.get(id(source), "")
            else:
                self.made[id(out)] = name
            self._follow(name, out, args)
        return out

    def _follow(self, name: str, out: Tensor, args: Any) -> None:
        if not any(id(arg) in self._input for arg in args if isinstance(arg, Tensor)):
            return
        if name in _SAME:
            self._input[id(out)] = out
        elif name in (*_SHIFT, *_SCALE):
            others = [arg for arg in args[:2] if not (isinstance(arg, Tensor) and id(arg) in self._input)]
            if len(others) == 1 and (text := self._constant(others[0])):
                self.first.append(f"{name.strip('_')} {text}")
                self._input[id(out)] = out

    def _constant(self, value: Any) -> str:
        """Return a number, or one for each channel, as text; nothing for anything else, and for numbers that change nothing."""
        if isinstance(value, (int, float)):
            return f"{value:.4g}"
        if not isinstance(value, Tensor) or value.requires_grad or value.numel() not in (1, self._channels):
            return ""
        sides = tuple(value.shape)
        by_channel = value.numel() == 1 or (self._channels in sides and sides.index(self._channels) in (0, 1))
        numbers = value.detach().flatten().tolist() if by_channel and value.is_floating_point() else []
        return f"({', '.join(f'{number:.4g}' for number in numbers)})" if numbers else ""


def _ends(model: Callable[[Tensor], Any], x: Tensor) -> tuple[list[str], str]:
    """Return what a model does first to its input, by channel, and the operation that its output comes from."""
    x = x.clone()
    with torch.no_grad(), _Ends(x) as seen:
        out = model(x)
    return seen.first, seen.made.get(id(out), "") if isinstance(out, Tensor) else ""


def about_normalisation(network: Callable[[Tensor], Any], x: Tensor) -> None:
    """Warn where a network normalises what it is given, which was normalised for it.

    Args:
        network: the wrapped module, that mean and std are given for.
        x: what it is given, (1, C, ...).
    """
    try:
        first, _ = _ends(network, x)
    except Exception:  # a doubt about something that does not run, or not in this way, helps nobody
        return
    if first and any(step.split()[0] in ("sub", "rsub", "add") for step in first):
        warn(
            f"The network begins with a normalisation of its own ({'; '.join(first[:3])}), and it is given images that mean and "
            "std have normalised already: they are normalised twice. Leave mean and std out, unless it was trained so."
        )


def about_scores(classifier: Callable[[Tensor], Any], x: Tensor, method: str) -> None:
    """Warn where a model returns probabilities to a method that takes the softmax of what a model returns.

    Args:
        classifier: the model.
        x: one input, (1, C, ...).
        method: for the text.
    """
    try:
        _, last = _ends(classifier, x)
    except Exception:  # as above
        return
    if last in _PROBABILITIES:
        warn(
            f"The model returns probabilities (its last operation is {_PROBABILITIES[last]}), and {method} takes the softmax of "
            "what a model returns: the scores are nearly uniform, and hardly anything is certified. Wrap the network without it."
        )
