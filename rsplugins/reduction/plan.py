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
        size: what the classifier takes, (h, w), or (t,) for video.
        windows: of the resized image, or of the frames.
        resize: (H, W) after resizing; None for none.
        chunk: frames that the classifier takes at once; None for images.
        norm: upper bound of the operator norm of resizing.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
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
        return {"shape": list(self.shape), "size": list(self.size)}


def make_plan(shape: Sequence[int], size: Sequence[int], parameters: Mapping[str, Any]) -> Plan:
    """Lay out the windows for inputs of ``shape``.

    Args:
        shape: of one raw input, (C, H, W) or (C, T, H, W).
        size: what the classifier takes, (h, w); for video (t,), the frames of one chunk.
        parameters: ``window`` (None: ``size``), ``stride`` (None: half of what the windows can move, so three along each axis),
            ``number`` (None: all) and ``resize``: a side length, ``"none"``, or ``"auto"``: 9/8 of the side, the paper's 36 for
            CIFAR's 32, where the images would otherwise leave room for one window only.

    Raises:
        ParameterError: a patch larger than the image, a video shorter than a sub-video, a sub-video that is not whole chunks.

    Example:
        >>> plan = make_plan((3, 32, 32), (32, 32), {"resize": "auto"})
        >>> plan.resize, len(plan.windows.positions), plan.windows.multiplicity, round(plan.lifted_norm, 3)
        ((36, 36), 9, 9, 3.39)
    """
    options = [parameters.get(name) for name in ("window", "stride", "number")]
    return _make_plan(tuple(shape), tuple(size), *options, parameters.get("resize", "none"))


@functools.lru_cache(maxsize=64)
def _make_plan(
    shape: tuple[int, ...], size: tuple[int, ...], side: int | None, stride: int | None, number: int | None, resize: int | str
) -> Plan:
    if len(shape) == 4:
        return _video_plan(shape, size, side, stride, number, resize)
    window = size if side is None else (side, side)
    raw = (shape[1], shape[2])
    target = raw
    if resize == "auto" and window == raw:
        target = (round(raw[0] * 9 / 8), round(raw[1] * 9 / 8))
    elif isinstance(resize, int):
        target = (resize, resize)
    windows = WindowSet.choose(target, window, stride or _half_way(target, window), number)
    return Plan(shape, size, windows, target, None, resize_norm(raw, target))


def _video_plan(
    shape: tuple[int, ...], size: tuple[int, ...], side: int | None, stride: int | None, number: int | None, resize: int | str
) -> Plan:
    if isinstance(resize, int):
        raise ParameterError("resize is for images; sub-videos are cut along the frames only.", fix="Leave resize out.")
    chunk, window, extent = size[0], side or size[0], shape[1:2]
    if window % chunk:
        raise ParameterError(
            f"A sub-video of {window} frames is not a whole number of chunks of {chunk} frames, which the classifier takes.",
            fix=f"Use window={window // chunk * chunk or chunk}.",
        )
    windows = WindowSet.choose(extent, (window,), stride or _half_way(extent, (window,)), number)
    return Plan(shape, size, windows, None, chunk, 1.0)


def _half_way(extent: Sequence[int], window: Sequence[int]) -> int:
    return max(1, max(n - w for n, w in zip(extent, window, strict=True)) // 2)
