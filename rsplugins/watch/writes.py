"""Writes in place that are read again through another tensor of the same memory, which traces lose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rsplugins.errors import UsageError
from rsplugins.watch import lines


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor's memory was written; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def lost(line: str, what: str = "it changes") -> UsageError:
    """Return the refusal of a write that a trace would lose."""
    return UsageError(
        f"The model's forward writes in place{lines.place(line)}, and a trace would lose it. Nothing was certified.",
        cause=f"{what} memory that is read again through another view of it, or has out=.",
        fix="Write it out of place: h = h - g for h.sub_(g), torch.where or torch.cat for an assignment to a slice.",
    )


class Views:
    """Knows of every tensor object whether its memory was written through another one since it was made.

    A tracer hands on what a write returns in place of the tensor that was written, and of no other view of its memory. Objects
    are followed, not operations, because the schemas of a few operations (einsum) do not say that they return views.
    """

    def __init__(self) -> None:
        self._made = WeakIdKeyDictionary()
        self._written: dict[int, tuple[int, str]] = {}
        self._clock = 1
        self._kept: list[torch.UntypedStorage] = []

    def after(self, given: list[Tensor], before: list[int | None], made: list[Tensor], pixels: list[Tensor]) -> str | None:
        """Note a call; return the line of an earlier write that it reads past, None where it reads none.

        Args:
            given: its tensors.
            before: their versions before it.
            made: what it returned.
            pixels: those of ``given`` that depend on pixels.
        """
        wrote = [tensor for tensor, count in zip(given, before, strict=True) if version(tensor) != count]
        found = None
        if made or wrote:
            found = self.line_of(pixels)
        self._clock += 1
        for tensor in wrote:
            if _memory(tensor) not in self._written:
                self._kept.append(tensor.untyped_storage())
            self._written[_memory(tensor)] = (self._clock, lines.current())
        for tensor in made:
            if any(tensor is one for one in wrote) or tensor not in self._made:
                self._made[tensor] = self._clock
        return found

    def line_of(self, tensors: list[Tensor]) -> str | None:
        """Return the line of a write that some tensors do not show, None where there is none."""
        return next((self._written[_memory(t)][1] for t in tensors if self._is_stale(t)), None)

    def _is_stale(self, tensor: Tensor) -> bool:
        written = self._written.get(_memory(tensor))
        return written is not None and self._made.get(tensor, 0) < written[0]  # type: ignore[no-untyped-call]


def _memory(tensor: Tensor) -> int:
    try:
        name: int = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0
    return name
