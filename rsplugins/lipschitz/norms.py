"""Upper bounds of spectral norms, proven in floating point: Gram iteration with every rounding error carried along."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff of float64."""

TOLERANCE = 1e-4
"""How far above the true norm a bound may stay, relatively, before the iteration stops."""

_SQUARINGS = 18
_SLACK = 1.0 + 1e-11


def up(value: float) -> float:
    """Return the next float64 above a computed value, so that one rounding to nearest cannot leave it below the true one."""
    return math.nextafter(value, math.inf)


def times(first: float, second: float) -> float:
    """Return an upper bound of a product of two non-negative numbers; exact when a factor is 0 or 1.

    Example:
        >>> times(1.0, 0.3), times(0.1, 3.0) > 0.1 * 3.0
        (0.3, True)
    """
    if 1.0 in (first, second) or 0.0 in (first, second):
        return first * second
    return up(first * second)


def matrix_norm(matrix: Tensor, *, tolerance: float = TOLERANCE) -> float:
    """Return an upper bound of the spectral norm of a matrix, at most ``tolerance`` (relative) above it.

    Args:
        matrix: (m, n), real or complex, any floating dtype; its entries are taken as exact.
        tolerance: relative width at which the iteration stops.

    Returns:
        A float64 that is never below the largest singular value; infinity when an entry is not finite.

    Example:
        >>> round(matrix_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), 3)
        4.0
    """
    return largest_norm(matrix[None], tolerance=tolerance)


def largest_norm(batch: Tensor, *, tolerance: float = TOLERANCE, floor: float = 0.0) -> float:
    r"""Return an upper bound of the largest spectral norm in a batch of matrices.

    Gram iteration: with :math:`X_0 = A` and :math:`X_{k+1} = X_k^H X_k` one has :math:`\|X_k\|_2^2 = \|X_{k+1}\|_2` for every
    matrix, so any bound of :math:`\|X_k\|_2` gives one of :math:`\|A\|_2` after k square roots, and its relative excess is
    divided by :math:`2^k`. The bound used at the end is the smaller of the Frobenius norm and :math:`\sqrt{\|X\|_1
    \|X\|_\infty}`.

    Proof with rounding. Let Y be the computed product. A conventional product (any order of summation, fused or not) of matrices
    with inner dimension m satisfies :math:`|Y - X^H X| \le \gamma |X|^H |X|` entrywise with
    :math:`\gamma = \sqrt{2}\, 2m u / (1 - 2 m u)`, complex entries included (Higham 2002, section 3.5 and lemma 3.5), so
    :math:`\|X\|_2^2 = \|X^H X\|_2 \le \|Y\|_2 + \gamma \|X\|_F^2`. Nothing else about Y is used, not even that it is Hermitian.
    Scaling by powers of two is exact but for underflow, which is far below the error term, as the largest entry is at least 1/2
    after scaling. Norms are sums of non-negative terms and are enlarged by their own relative error. Hence the returned number is
    at least the true norm.

    A matrix leaves the iteration early once its bound is below what another one is known to reach: that can never lower the
    result below the truth, since the bounds of all matrices enter the maximum.

    Args:
        batch: (B, m, n), real or complex.
        tolerance: relative width at which the iteration stops.
        floor: a value that the result need not go below, such as a bound already found for other matrices of the same maximum.

    Returns:
        A float64 that is never below the largest singular value in the batch; infinity when an entry is not finite.

    Source: the iteration is that of Delattre, Barthelemy, Araujo and Allauzen, ICML 2023; the error terms are ours.
    """
    if batch.numel() == 0:
        return 0.0
    X = batch.to(torch.complex128 if batch.is_complex() else torch.float64)
    if not bool(torch.isfinite(torch.view_as_real(X) if X.is_complex() else X).all()):
        return math.inf
    if X.shape[-2] < X.shape[-1]:
        X = X.mH
    state = _Iteration(X)
    finished = 0.0
    for _ in range(_SQUARINGS):
        upper, lower = state.bounds()
        reached = max(floor, float(lower.max()))
        keep = upper > reached * (1.0 + tolerance)
        if not bool(keep.all()):
            finished = max(finished, float(upper[~keep].max()))
        if not bool(keep.any()):
            return finished * _SLACK
        state = state.only(keep) if not bool(keep.all()) else state
        state.square()
    return max(finished, float(state.bounds()[0].max())) * _SLACK


@dataclass
class _Iteration:
    """The matrices still in play and, by level, what leads from a bound at the present level back to one of the norm."""

    X: Tensor
    errors: list[Tensor] = field(default_factory=list)
    exponents: list[Tensor] = field(default_factory=list)
    best: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.exponents:
            self._scale()

    def _scale(self) -> None:
        # By the largest entry: a Frobenius norm of tiny entries would underflow.
        exponent = torch.frexp(self.X.abs().amax((-2, -1))).exponent
        half = -exponent.to(torch.float64)[:, None, None]
        # Two steps: one power of two may be out of range when the exponent is extreme.
        self.X = self.X * torch.exp2(torch.floor(half / 2)) * torch.exp2(half - torch.floor(half / 2))
        self.exponents.append(exponent.to(torch.float64))

    def square(self) -> None:
        """Replace X by its Gram matrix and note the error of that product."""
        inner = 2 * self.X.shape[-2]
        gamma = math.sqrt(2.0) * inner * UNIT / (1.0 - inner * UNIT) * 1.01
        self.errors.append(gamma * _enlarged(_frobenius(self.X), self.X) ** 2)
        self.X = self.X.mH @ self.X
        self._scale()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return upper bounds (B,) and approximate lower bounds (B,) of the norms at level 0."""
        magnitude = self.X.abs()
        product = magnitude.sum(-1).amax(-1) * magnitude.sum(-2).amax(-1)
        upper = _enlarged(torch.minimum(_frobenius(self.X), product.sqrt()), self.X)
        lower = magnitude.square().sum(-2).amax(-1).sqrt()
        for error, exponent in zip(reversed(self.errors), reversed(self.exponents[1:]), strict=True):
            upper = torch.sqrt(upper * torch.exp2(exponent) + error) * (1.0 + 8 * UNIT)
            lower = torch.sqrt(torch.clamp(lower * torch.exp2(exponent) - error, min=0.0))
        scale = torch.exp2(self.exponents[0])
        upper, lower = upper * scale, lower * scale
        self.best = upper if self.best is None else torch.minimum(self.best, upper)
        return self.best, lower

    def only(self, keep: Tensor) -> _Iteration:
        """Return the state of the matrices that ``keep`` (B,) marks."""
        best = None if self.best is None else self.best[keep]
        return _Iteration(self.X[keep], [e[keep] for e in self.errors], [e[keep] for e in self.exponents], best)


def _frobenius(X: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1))
    return norm


def _enlarged(value: Tensor, X: Tensor) -> Tensor:
    return value * (1.0 + 4 * (X.shape[-1] * X.shape[-2] + 8) * UNIT)
