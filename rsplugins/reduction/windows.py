"""A fixed set of overlapping windows, how often they cover a pixel, and the norm of resizing: what a radius must be divided by.

The published Smooth-Reduce (Joshi et al., arXiv 2205.06154) adds independent noise to every patch. That noise lives in the
lifted space X = (patch_1, ..., patch_P) = L(resize(x)), so a perturbation d of the image is a perturbation L R d of what is
smoothed, and

    ||L R d||_2 <= ||L||_2 ||R||_2 ||d||_2,      ||L||_2^2 = the largest number of windows that cover one pixel.

The second identity holds because L^T L is diagonal with the coverage counts. No torch here: ``rsplugins verify`` recomputes both
factors from the parameters and the image's size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rsplugins.errors import ParameterError

NORM_SLACK = 1e-9
"""Relative amount added to a norm from a float64 SVD, a thousand times its backward error for the sizes of images."""


@dataclass(frozen=True)
class WindowSet:
    """Windows of one size at fixed places of a grid: patches of an image, (H, W), or sub-videos of a video, (T,).

    Attributes:
        extent: size of what the windows are cut from.
        window: size of one window, in the same axes.
        positions: the first corner of each window.

    Example:
        >>> patches = WindowSet.choose((36, 36), (32, 32), 1)
        >>> len(patches.positions), patches.multiplicity, patches.uncovered
        (25, 25, 0)
        >>> WindowSet.choose((36, 36), (32, 32), 1, number=4).positions
        ((0, 0), (0, 4), (4, 0), (4, 4))
        >>> WindowSet.choose((128,), (64,), 16).multiplicity
        4
    """

    extent: tuple[int, ...]
    window: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]

    @classmethod
    def choose(cls, extent: Sequence[int], window: Sequence[int], stride: int, number: int | None = None) -> WindowSet:
        """Place windows every ``stride`` along each axis, and keep ``number`` of them spread as far apart as possible.

        Args:
            extent: size of the image (H, W) or of the video (T,).
            window: size of a window.
            stride: step between neighbours, >= 1.
            number: how many to keep; None keeps all. Not the first ones in raster order, which would all look at one corner.

        Raises:
            ParameterError: a window larger than the extent, or a stride or number that cannot be met.
        """
        extent, window = tuple(extent), tuple(window)
        if any(w > n or w < 1 for n, w in zip(extent, window, strict=True)):
            raise ParameterError(
                f"A window of {_size(window)} does not fit into {_size(extent)}.",
                cause="the patch is larger than the image, or the sub-video longer than the video.",
                fix="Use a smaller window, or resize the image first (resize=...).",
            )
        if stride < 1:
            raise ParameterError(f"stride is {stride}; expected at least 1.")
        grid = list(itertools.product(*(range(0, n - w + 1, stride) for n, w in zip(extent, window, strict=True))))
        if number is not None and not 1 <= number <= len(grid):
            raise ParameterError(
                f"number is {number}, but windows of {_size(window)} every {stride} in {_size(extent)} have {len(grid)} places.",
                fix=f"Use a number from 1 to {len(grid)}, or a smaller stride.",
            )
        chosen = grid if number is None or number == len(grid) else _spread(grid, number)
        return cls(extent, window, tuple(chosen))

    @property
    def coverage(self) -> npt.NDArray[np.int64]:
        """How many windows cover each pixel, shape ``extent``."""
        counts = np.zeros(self.extent, dtype=np.int64)
        for position in self.positions:
            counts[tuple(slice(p, p + w) for p, w in zip(position, self.window, strict=True))] += 1
        return counts

    @property
    def multiplicity(self) -> int:
        """The largest number of windows that cover one pixel: the square of the lifted map's operator norm."""
        return int(self.coverage.max())

    @property
    def uncovered(self) -> int:
        """How many pixels no window sees. Allowed: they cannot change the prediction."""
        return int((self.coverage == 0).sum())

    def describe(self) -> dict[str, Any]:
        """Return the set as JSON values, for the manifest."""
        return {"extent": list(self.extent), "window": list(self.window), "positions": [list(p) for p in self.positions]}


def resize_norm(source: Sequence[int], target: Sequence[int]) -> float:
    """Return an upper bound of the operator norm (l2 to l2) of bilinear resizing from one size to another.

    Bilinear resizing is separable, so the norm is the product of the norms along the axes; each is the largest singular value of
    the axis's interpolation matrix in float64, rounded up by :data:`NORM_SLACK`. Equal sizes give exactly 1.

    Args:
        source: (H, W) of the raw image.
        target: (H, W) after resizing.

    Example:
        >>> round(resize_norm((32, 32), (36, 36)), 3), resize_norm((32, 32), (32, 32))
        (1.13, 1.0)
    """
    return math.prod(_axis_norm(n, m) for n, m in zip(source, target, strict=True))


def interpolation_matrix(source: int, target: int) -> npt.NDArray[np.float64]:
    """Return the (target, source) matrix of bilinear interpolation with half-pixel centres (``align_corners=False``)."""
    places = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0.0, None)
    left = np.minimum(places.astype(np.int64), source - 1)
    right = np.minimum(left + 1, source - 1)
    weight = places - left
    matrix = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(matrix, (rows, left), 1.0 - weight)
    np.add.at(matrix, (rows, right), weight)
    return matrix


@functools.lru_cache(maxsize=256)
def _axis_norm(source: int, target: int) -> float:
    if source == target:
        return 1.0
    return float(np.linalg.norm(interpolation_matrix(source, target), ord=2)) * (1 + NORM_SLACK)


def _spread(grid: list[tuple[int, ...]], number: int) -> list[tuple[int, ...]]:
    """Farthest-point selection, beginning at the first corner; ties go to the first in raster order. Sorted in raster order."""
    points = np.array(grid, dtype=np.float64)
    chosen = [0]
    distance = ((points - points[0]) ** 2).sum(axis=1)
    while len(chosen) < number:
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, ((points - points[farthest]) ** 2).sum(axis=1))
    return [grid[index] for index in sorted(chosen)]


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) + (" frames" if len(size) == 1 else "")
