"""What a set of Smooth-Reduce parameters means for images of one shape. No torch: claims recompute it from the evidence."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsplugins.errors import ParameterError
from rsplugins.reduction.windows import WindowSet, resize_norm

LIFTED_NOISE = ("independent", "as-published")
"""Noise modes whose votes are counted under independent noise on every window."""


@dataclass(frozen=True)
class Plan:
    """The windows of one input shape and the norms between the raw pixels and the noise.

    Attributes:
        shape: of the raw input, (C, H, W) or (C, T, H, W).
        windows: of the resized image, or of the frames.
        resize: (H, W) after resizing; None for none.
        chunk: frames that the classifier takes at once; None for images.
        norm: upper bound of the operator norm of resizing.
    """

    shape: tuple[int, ...]
    windows: WindowSet
    resize: tuple[int, int] | None
    chunk: int | None
    norm: float

    @property
    def lifted_norm(self) -> float:
        """Upper bound of the norm of the whole lifted map: sqrt(multiplicity) times the norm of resizing."""
        return math.sqrt(self.windows.multiplicity) * self.norm

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one window as the classifier (or the chunking before it) sees it."""
        if self.chunk is None:
            return (self.shape[0], *self.windows.window)
        return (self.shape[0], *self.windows.window, *self.shape[2:])

    def geometry(self) -> dict[str, Any]:
        """Return what a claim needs besides the parameters to make this plan again, as JSON values."""
        return {"shape": list(self.shape), "window": list(self.windows.window), "chunk": self.chunk}


def make_plan(shape: Sequence[int], window: Sequence[int], chunk: int | None, parameters: Mapping[str, Any]) -> Plan:
    """Lay out the windows for inputs of ``shape``.

    Args:
        shape: of one raw input, (C, H, W) or (C, T, H, W).
        window: (h, w) of a patch, or (t,) of a sub-video.
        chunk: frames that the classifier takes at once; None for images.
        parameters: ``stride``, and optionally ``number`` and ``resize`` (one side length).

    Raises:
        ParameterError: a patch larger than the image, a video shorter than a sub-video, a sub-video that is not whole chunks.
    """
    resize = parameters.get("resize")
    return _make_plan(tuple(shape), tuple(window), chunk, parameters["stride"], parameters.get("number"), resize)


@functools.lru_cache(maxsize=64)
def _make_plan(
    shape: tuple[int, ...], window: tuple[int, ...], chunk: int | None, stride: int, number: int | None, resize: int | None
) -> Plan:
    if chunk is None:
        size = (shape[1], shape[2])
        target = size if resize is None else (resize, resize)
        return Plan(shape, WindowSet.choose(target, window, stride, number), target, None, resize_norm(size, target))
    if resize is not None:
        raise ParameterError("resize is for images; sub-videos are cut along the frames only.", fix="Leave resize out.")
    if window[0] % chunk:
        raise ParameterError(
            f"A sub-video of {window[0]} frames is not a whole number of chunks of {chunk} frames, which the classifier takes.",
            fix=f"Use window={window[0] // chunk * chunk or chunk}.",
        )
    return Plan(shape, WindowSet.choose(shape[1:2], window, stride, number), None, chunk, 1.0)
