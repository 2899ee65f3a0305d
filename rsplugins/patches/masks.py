"""Masks along one axis of an image such that every patch lies in at least one; imports no torch.

Xiang, Mahloujifar, Mittal, "PatchCleanser" (USENIX Security 2022), section 3.3: of an axis of n pixels, with patches of side p
and k masks, masks begin every s = ceil((n - p + 1) / k) pixels and are p + s - 1 wide. The last one is moved inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Span = tuple[int, int]
"""First pixel, and the one behind the last."""


def side(patch: float, height: int, width: int) -> int:
    """Return the side of a patch in pixels: itself from 1 on, the side of a square of that share of the image below.

    Example:
        >>> side(2, 32, 32), side(0.02, 224, 224)
        (2, 32)
    """
    return int(patch) if patch >= 1 else max(1, math.ceil(math.sqrt(patch * height * width) * (1 - 1e-12)))


def spans(length: int, patch: int, masks: int) -> list[Span]:
    """Return the masks along an axis.

    Args:
        length: of the axis, in pixels.
        patch: side of the patch, from 1 to ``length``.
        masks: at most so many.

    Example:
        >>> spans(6, 2, 2)
        [(0, 4), (2, 6)]
    """
    step = math.ceil((length - patch + 1) / masks)
    width = min(length, patch + step - 1)
    return list(dict.fromkeys((start, start + width) for start in (min(i * step, length - width) for i in range(masks))))


def covers(found: Sequence[Sequence[int]], length: int, patch: int) -> bool:
    """Return whether every patch along an axis lies in one of the masks.

    Example:
        >>> covers([(0, 4), (2, 6)], 6, 2), covers([(0, 3), (3, 6)], 6, 2)
        (True, False)
    """
    starts = range(length - patch + 1)
    return bool(starts) and all(any(first <= at and at + patch <= end for first, end in found) for at in starts)
