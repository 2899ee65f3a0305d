"""Upper bounds of spectral norms, proven in floating point: a Cholesky factor of what is left shows that nothing is above."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff of float64."""

TOLERANCE = 1e-4
"""How far above the true norm a bound may stay, relatively, before the iteration stops."""

_SLACK = 1.0 + 1e-11
_POWERS = 12
"""Steps of power iteration that find the matrices whose eigenvalues are computed; a poor guess costs time alone."""
_MODERATE = 200
"""Exponents of two whose squares, and the errors of these, are in range."""
_FEW_ENTRIES = 2**20
_EXACT_SIDE = 1024
"""Side up to which eigenvalues are computed rather than guessed by many more steps."""


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

    A number t is above all norms when :math:`t^2 I - A^H A` has a Cholesky factor for every matrix. It is taken a hair above the
    largest eigenvalue that could be found, by power iteration and then for the few matrices that seem largest; where a factor
    does not exist, the eigenvalues of those matrices are computed too.

    Proof with rounding. Let Y be the computed product. A conventional product (any order of summation, fused or not) of matrices
    with inner dimension m satisfies :math:`|Y - A^H A| \le \gamma_m |A|^H |A|` entrywise with
    :math:`\gamma_m = \sqrt{2}\, 2m u / (1 - 2 m u)`, complex entries included (Higham 2002, section 3.5 and lemma 3.5), for
    the lower triangle, which alone is read, and so for the Hermitian matrix that it stands for: :math:`\|A\|_2^2 \le \|Y\|_2
    + \gamma_m \|A\|_F^2`. Let S be the computed :math:`t^2 I - Y`, off by at most :math:`u (t^2 + \max Y_{ii})` on the diagonal.
    When its Cholesky factorisation runs to its end with a finite factor R, then :math:`R^H R = S + \Delta` with
    :math:`|\Delta| \le \gamma_{n+1} |R|^H |R|` (Higham 2002, theorem 10.3, with the same constant for complex entries), and
    :math:`\||R|^H |R|\|_2 \le \|R\|_F^2 = \mathrm{tr}(S + \Delta)`, so :math:`\|\Delta\|_2 \le \gamma_{n+1}
    \mathrm{tr}(S) / (1 - \gamma_{n+1})` and :math:`S \succeq -\|\Delta\|_2 I`. Hence :math:`\|Y\|_2 \le t^2 + u (t^2 + \max
    Y_{ii}) + \|\Delta\|_2`. Scaling by powers of two is exact but for underflow, which is far below the error terms, as the
    largest entry is then near 1, or was not far from it; the guesses enter no bound.

    Matrices whose Frobenius norm, or :math:`\sqrt{\|A\|_1 \|A\|_\infty}`, is below what another one reaches are left out.

    Args:
        batch: (B, m, n), real or complex.
        tolerance: how far above the largest norm the bound may stay, relatively; never less than rounding takes.
        floor: a value that the result need not go below, such as a bound already found for other matrices of the same maximum.

    Returns:
        A float64 that is never below the largest singular value in the batch; infinity when an entry is not finite.

    Source: S. M. Rump, "Verification of positive definiteness", BIT 46 (2006), for the use of Cholesky's factor.
    """
    if batch.numel() == 0:
        return 0.0
    X = batch.to(torch.complex128 if batch.is_complex() else torch.float64)
    largest = float((torch.view_as_real(X) if X.is_complex() else X).abs().amax())
    if not math.isfinite(largest):
        return math.inf
    X, exponent = _scaled(X.mH if X.shape[-2] < X.shape[-1] else X, largest)
    upper, lower, mass = _coarse(X)
    reached = max(math.ldexp(floor, -exponent) if floor else 0.0, float(lower.max()))
    keep = upper > reached * (1.0 + tolerance)
    bound = float(upper[~keep].max()) if not bool(keep.all()) else 0.0
    if bool(keep.any()):
        bound = max(bound, min(_certified(X[keep], float(mass.max()), reached, tolerance), float(upper[keep].max())))
    return math.ldexp(bound * _SLACK, exponent)


def _scaled(X: Tensor, largest: float) -> tuple[Tensor, int]:
    """Return matrices divided by a power of two where squares of their entries would be out of range, and its exponent."""
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _MODERATE:
        return X, 0
    half = -exponent // 2  # two steps: one power of two may be out of range when the exponent is extreme
    return X * 2.0**half * 2.0 ** (-exponent - half), exponent


def _coarse(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return upper bounds (B,) of norms from sums, lower bounds, approximate, and upper bounds of squared Frobenius norms."""
    squares = X.real.square()  # abs() of complex numbers is slow
    if X.is_complex():
        squares.addcmul_(X.imag, X.imag)
    columns, grown = squares.sum(-2), 1.0 + 4 * (X.shape[-1] * X.shape[-2] + 8) * UNIT
    upper = mass = columns.sum(-1)
    if X.numel() <= _FEW_ENTRIES:  # exact for an identity; of many matrices the sums would take as long as what they save
        magnitude = squares.sqrt()
        upper = torch.minimum(mass, magnitude.sum(-1).amax(-1) * magnitude.sum(-2).amax(-1))
    return upper.sqrt() * grown, columns.amax(-1).sqrt(), mass * grown


def _gamma(inner: int) -> float:
    return math.sqrt(2.0) * 2 * inner * UNIT / (1.0 - 2 * inner * UNIT) * 1.01


def _certified(X: Tensor, mass: float, reached: float, tolerance: float) -> float:
    """Return a bound of the norms of tall matrices; see :func:`largest_norm`.

    Args:
        X: (B, m, n), m >= n.
        mass: at least the squares of their Frobenius norms.
        reached: what the result need not go below.
        tolerance: see there.
    """
    gram, side = X.mH @ X, X.shape[-1]
    guesses, opened = _eigenvalues_by_powers(gram, _POWERS), torch.arange(len(X))
    solved = torch.zeros(len(X), dtype=torch.bool)
    room, square = 1.0 + (4 * side + 16) ** 2 * UNIT, reached**2
    while len(opened):
        largest = opened[guesses[opened].argsort(descending=True)[:2]]
        if bool(solved[largest].all()):
            room = 1.0 + 4 * (room - 1.0)  # nothing is known better: it is rounding that forbids the factor
            if room > 1.5:
                return math.sqrt(mass)  # whatever the eigenvalues are, they are not those of these matrices
        fresh = largest[~solved[largest]]
        if side <= _EXACT_SIDE or len(opened) < len(X):
            guesses[fresh] = torch.linalg.eigvalsh(gram[fresh])[:, -1].cpu()
            solved[fresh] = True
        else:
            guesses[fresh] = _eigenvalues_by_powers(gram[fresh], 16 * _POWERS)
        square = max(square, float(guesses[largest].max()) * room * (1.0 + tolerance / 2) ** 2)
        rest = -gram[opened]
        rest.diagonal(dim1=-2, dim2=-1).add_(square)
        factor, info = torch.linalg.cholesky_ex(rest)
        diagonal = factor.diagonal(dim1=-2, dim2=-1).abs()
        good = (info == 0) & diagonal.isfinite().all(-1) & (diagonal > 0).all(-1)
        if side > _EXACT_SIDE and not bool(good.any()) and len(opened) == len(X):
            guesses[opened] = torch.linalg.eigvalsh(gram[opened])[:, -1].cpu()
            solved[opened] = True
        opened = opened[~good.cpu()]
    largest_entry = float(gram.diagonal(dim1=-2, dim2=-1).abs().max())
    gamma = _gamma(side + 1)
    factorisation = gamma / (1.0 - gamma) * side * square * (1.0 + 4 * UNIT)  # tr(S) <= n t^2, since Y's diagonal is not negative
    total = square + 2 * UNIT * (square + largest_entry) + factorisation + _gamma(X.shape[-2]) * mass
    return math.sqrt(total * (1.0 + 16 * UNIT)) * (1.0 + 4 * UNIT)


def _eigenvalues_by_powers(gram: Tensor, steps: int) -> Tensor:
    """Return what power iteration finds of the largest eigenvalues (B,): no bounds."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[-1], 2, generator=generator, dtype=torch.float64)
    vectors = start.to(gram).expand(len(gram), -1, -1)
    for _ in range(steps):
        vectors = gram @ vectors
        vectors = vectors / vectors.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    sizes = vectors.abs().square().sum(-2).clamp_min(1e-300)
    found: Tensor = ((vectors.conj() * (gram @ vectors)).sum(-2).real / sizes).amax(-1)
    return found.cpu()
