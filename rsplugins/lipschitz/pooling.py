"""Pooling and resizing, one spatial dimension at a time.

Average pooling and linear interpolation act on each dimension by itself: their operator is a Kronecker product of one small
matrix a dimension, whose norm is the product of the norms. Max pooling is bounded by how many windows see one pixel, also a
product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.lipschitz.norms import matrix_norm, times, up


def pooling_positions(n: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> list[list[int]]:
    """Return, for each output of one dimension, the input positions its window covers (padding left out)."""
    return [[p for p in (o * stride - padding + j * dilation for j in range(kernel)) if 0 <= p < n] for o in range(out)]


def adaptive_positions(n: int, out: int) -> list[list[int]]:
    """Return the same for adaptive pooling, where window o is [floor(o n / out), ceil((o + 1) n / out))."""
    return [list(range((o * n) // out, -((-(o + 1) * n) // out))) for o in range(out)]


def most_windows(positions: Sequence[Sequence[int]]) -> int:
    """Return the largest number of windows that share one position."""
    counts: dict[int, int] = {}
    for window in positions:
        for p in window:
            counts[p] = counts.get(p, 0) + 1
    return max(counts.values(), default=0)


def max_pool_norm(positions: Sequence[Sequence[Sequence[int]]]) -> float:
    r"""Return the Lipschitz constant of max pooling with these windows, given by dimension.

    The maximum over a window moves by at most the largest move in it, so :math:`|y_o - y'_o|^2 \le \sum_{p \in o} |x_p -
    x'_p|^2`; summed over the windows each pixel counts as often as windows see it, m times at most, hence :math:`\sqrt m`, with m
    the product over the dimensions. It is reached where one pixel is the maximum of all its windows.

    Example:
        >>> max_pool_norm([pooling_positions(8, 4, 3, 2, 1)] * 2)
        2.0
    """
    windows = math.prod(most_windows(by_dimension) for by_dimension in positions)
    root = math.isqrt(windows)
    return float(root) if root * root == windows else up(math.sqrt(windows))


def average_matrix(n: int, positions: Sequence[Sequence[int]], divisors: Sequence[float]) -> Tensor:
    """Return the (out, n) matrix of one dimension of average pooling, rows divided by their own divisor."""
    matrix = torch.zeros(len(positions), n, dtype=torch.float64)
    for o, (window, divisor) in enumerate(zip(positions, divisors, strict=True)):
        for p in window:
            matrix[o, p] += 1.0 / divisor
    return matrix


def average_divisors(n: int, out: int, kernel: int, stride: int, padding: int, count_include_pad: bool) -> list[int]:
    """Return the size that PyTorch divides each window of one dimension by."""
    divisors = []
    for o in range(out):
        start = o * stride - padding
        end = min(start + kernel, n + padding)
        divisors.append(end - start if count_include_pad else min(end, n) - max(start, 0))
    return divisors


def kronecker_norm(matrices: Sequence[Tensor]) -> float:
    """Return an upper bound of the norm of a Kronecker product: the product of the norms."""
    return reduce(times, (_tidy(matrix_norm(matrix, tolerance=1e-9), matrix) for matrix in matrices), 1.0)


def _tidy(bound: float, matrix: Tensor) -> float:
    # A permutation or a selection of pixels has norm exactly 1; say so, for identities must cost nothing.
    selects = bool(((matrix == 0) | (matrix == 1)).all()) and most_ones(matrix) <= 1
    return min(bound, 1.0) if selects else bound


def most_ones(matrix: Tensor) -> int:
    """Return the largest number of non-zero entries in any row or column."""
    nonzero = matrix != 0
    return int(max(nonzero.sum(0).max(), nonzero.sum(1).max())) if matrix.numel() else 0


def interpolation_matrix(n: int, out: int, mode: str, align_corners: bool | None, scale: float | None) -> Tensor:
    """Return the (out, n) matrix that PyTorch's 1-D interpolation applies, found by resizing the unit vectors.

    Args:
        n: input length.
        out: output length.
        mode: ``"linear"``, ``"nearest"`` or ``"nearest-exact"``.
        align_corners: as for ``torch.nn.functional.interpolate``.
        scale: the scale factor when the positions follow from it instead of from the sizes, else None.
    """
    units = torch.eye(n, dtype=torch.float64)[:, None]
    flag = align_corners if mode == "linear" else None
    if scale is None:
        return F.interpolate(units, size=out, mode=mode, align_corners=flag)[:, 0].T
    return F.interpolate(units, scale_factor=scale, mode=mode, align_corners=flag)[:, 0].T
