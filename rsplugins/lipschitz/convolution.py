"""Upper bounds of the norm of a convolution, from its transfer matrices on a torus or from the materialised operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.lipschitz.norms import TOLERANCE, UNIT, largest_norm, times, up
from rsplugins.machine import cache
from rsplugins.machine.progress import step

MATERIALISE_SIDE = 1024
"""An operator whose smaller side is at most this is materialised, for an exact norm at the borders."""

_MATERIALISE_ENTRIES = 8_000_000
_CHUNK_ENTRIES = 4_000_000
_WORTH_KEEPING = 2**22
"""Weights times pixels from which a norm takes longer than reading it again."""


@dataclass(frozen=True)
class Convolution:
    """A convolution as a linear map between images: the bias plays no part.

    Attributes:
        weight: (out, in / groups, k_1, ..., k_d), float64.
        size: spatial size of the input, d numbers.
        stride: by dimension.
        padding: (before, after) by dimension.
        dilation: by dimension.
        groups: number of groups.
        circular: whether the padding wraps around instead of adding zeros.
    """

    weight: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    circular: bool = False

    @property
    def out_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return tuple(
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, k, s, (before, after), d in zip(
                self.size, self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )

    def scaled_out(self, scale: Tensor) -> Convolution:
        """Return the map followed by a multiplication by channel, ``scale`` of shape (out,)."""
        return replace(self, weight=self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1)))

    def scaled_in(self, scale: Tensor) -> Convolution:
        """Return the map preceded by a multiplication by channel, ``scale`` of shape (in,)."""
        grouped = scale.reshape(self.groups, 1, -1).expand(-1, self.weight.shape[0] // self.groups, -1)
        return replace(self, weight=self.weight * grouped.reshape(*self.weight.shape[:2], *[1] * (self.weight.dim() - 2)))

    def apply(self, x: Tensor) -> Tensor:
        """Return the image of x, (B, in, n_1, ..., n_d) in float64, without a bias."""
        pads = [side for pair in reversed(self.padding) for side in pair]
        x = F.pad(x, pads, mode="circular") if self.circular and any(pads) else F.pad(x, pads)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        result: Tensor = convolve(x, self.weight, None, self.stride, 0, self.dilation, self.groups)
        return result

    def norm(self, tolerance: float = TOLERANCE) -> float:
        """Return an upper bound of the spectral norm; see :func:`convolution_norm`. Long ones are kept by weight and geometry."""
        if not bool(torch.isfinite(self.weight).all()):
            return math.inf
        if self.weight.numel() * math.prod(self.size) < _WORTH_KEEPING:
            return self._norm(tolerance)
        geometry = [value for name, value in sorted(vars(self).items()) if name != "weight"]
        key = (cache.fingerprint(self.weight), *geometry, tolerance, torch.__version__)
        known = cache.recall("convolution-norms", *key)
        if isinstance(known, float):
            return known
        out, into, *kernel = self.weight.shape
        with step(f"norm of a convolution {into * self.groups} -> {out}, {'x'.join(map(str, kernel))}"):
            found = self._norm(tolerance)
        if math.isfinite(found):
            cache.keep(found, "convolution-norms", *key)
        return found

    def _norm(self, tolerance: float) -> float:
        if self._exact_on_torus():
            return self._torus_norm(tolerance)
        bound = self._materialised_norm(tolerance) if self.is_small() else math.inf
        return bound if math.isfinite(bound) else self._torus_norm(tolerance)

    def matrix(self) -> Tensor:
        """Return the operator as a matrix, (out * prod(out_size), in * prod(size)) in float64.

        Each column is the image of a unit vector. Its entries are single weights, or sums of the few weights that circular
        padding brings to one place; :meth:`norm` adds what their rounding may take away.
        """
        channels = self.weight.shape[1] * self.groups
        units = torch.eye(channels * math.prod(self.size), dtype=torch.float64).reshape(-1, channels, *self.size)
        return self.apply(units).flatten(1).T

    def is_small(self) -> bool:
        """Return whether the operator can be materialised at little cost."""
        rows = self.weight.shape[0] * math.prod(self.out_size)
        columns = self.weight.shape[1] * self.groups * math.prod(self.size)
        return min(rows, columns) <= MATERIALISE_SIDE and columns <= 4096 and rows * columns <= _MATERIALISE_ENTRIES

    def _materialised_norm(self, tolerance: float) -> float:
        bound = largest_norm(self.matrix()[None], tolerance=tolerance)
        if not self.circular:
            return bound
        # Each entry is a sum of at most all taps, which may cancel: the error is relative to the sum of their magnitudes.
        taps = math.prod(self.weight.shape[2:])
        magnitudes = replace(self, weight=self.weight.abs()).matrix()
        return up(bound + 2 * taps * UNIT * float(torch.linalg.vector_norm(magnitudes)))

    def _exact_on_torus(self) -> bool:
        wraps = self.circular and any(before + after for before, after in self.padding)
        pointwise = all(k == 1 for k in self.weight.shape[2:]) and not wraps
        whole = all(n % s == 0 and out * s == n for n, s, out in zip(self.size, self.stride, self.out_size, strict=True))
        return pointwise or (self.circular and whole)

    def _torus_norm(self, tolerance: float) -> float:
        torus, stride, multiplicity = self._torus()
        bound = 0.0
        for matrices in _transfer_matrices(self.weight, torus, stride, self.dilation, self.groups):
            bound = max(bound, largest_norm(matrices, tolerance=tolerance, floor=bound))
        l1 = self.weight.abs().flatten(2).sum(-1).reshape(self.groups, -1, self.weight.shape[1])
        rounding = (64 + 8 * sum(self.weight.shape[2:])) * UNIT * float(torch.linalg.vector_norm(l1, dim=(-2, -1)).max())
        # Aliasing stacks prod(stride) transfer matrices beside each other: their errors add up in quadrature.
        bound = up(bound + times(rounding * 1.01, math.sqrt(math.prod(stride))))
        return bound if multiplicity == 1 else times(bound, up(math.sqrt(multiplicity)))

    def _torus(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return the size of the torus, the stride on it and how many outputs may coincide there."""
        torus, stride, multiplicity = [], [], 1
        for n, k, s, (before, after), out in zip(
            self.size, self.weight.shape[2:], self.stride, self.padding, self.out_size, strict=True
        ):
            if k == 1 and not (self.circular and before + after):
                torus.append(s)  # one frequency tells all: the transfer matrix is constant
                stride.append(s)
            elif self.circular:
                keeps = s if n % s == 0 else 1
                torus.append(n)
                stride.append(keeps)
                multiplicity *= -(-out // (n // keeps)) if keeps == s else -(-(s * out) // n)
            else:
                least = max(n + max(before, after), s * out)
                torus.append(-(-least // s) * s)
                stride.append(s)
        return tuple(torus), tuple(stride), multiplicity


def convolution_norm(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    tolerance: float = TOLERANCE,
) -> float:
    r"""Return an upper bound of the l2 operator norm of a convolution on images of a given size.

    **Circular padding, n divisible by the stride s.** The unitary discrete Fourier transform turns the stride-1 convolution on
    the torus into one matrix a frequency, :math:`\hat K(\omega)`. Keeping every s-th output sums the s aliased frequencies:
    :math:`\hat y(\nu) = s^{-1/2} \sum_j \hat K(\nu + j n / s)\, \hat x(\nu + j n / s)`. So the operator is unitarily equivalent
    to the block-diagonal one with blocks :math:`s^{-1/2} [\hat K(\nu), \hat K(\nu + n/s), \ldots]` (Kronecker over the
    dimensions), and its norm is the largest of theirs: exact. When more outputs are produced than the torus has places, m of them
    at most coincide, which is a factor :math:`\sqrt m` at most. When s does not divide n the outputs are among those of stride 1
    (again with multiplicity).

    **Zero padding.** Output o reads the padded positions :math:`s o - p + d k`, all in :math:`[-p, n + p' - 1]`. Put the image on
    a torus of N places, N a multiple of s, :math:`N \ge n + \max(p, p')` and :math:`N \ge s \cdot \mathrm{out}`, with zeros
    elsewhere. The first condition keeps positions -p .. -1 and n .. n+p'-1 (taken modulo N) off the image, so each output equals
    the output of the circular convolution at the same shift; the second keeps the shifts distinct. The zero-padded convolution is
    therefore the circular one restricted to images that are zero outside the box (an isometric embedding) followed by dropping
    outputs (a projection), and its norm is at most that of the circular one.

    **Groups** are a direct sum: the largest norm counts. **Dilation** moves the taps. Small operators with zero padding are
    materialised instead, since the torus does not see the borders.

    Rounding: each transfer matrix is computed from tables of exponentials with an error of at most :math:`(64 + 8 \sum k) u`
    times the l1 norms of the kernels, whose Frobenius norm over channels is added.

    Args:
        weight: (out, in / groups, k_1, ..., k_d), d = 1, 2 or 3.
        size: spatial size of the input.
        stride: as for ``torch.nn.functional.conv2d``.
        padding: a number, numbers by dimension, ``"same"`` or ``"valid"``.
        dilation: as for ``torch.nn.functional.conv2d``.
        groups: as for ``torch.nn.functional.conv2d``.
        padding_mode: ``"zeros"`` or ``"circular"``.
        tolerance: relative width at which the iteration stops.

    Returns:
        A float64 that is never below the norm; infinity when a weight is not finite.

    Example:
        >>> box = torch.full((1, 1, 3, 3), 1 / 9)
        >>> round(convolution_norm(box, (8, 8), padding=1, padding_mode="circular"), 4)
        1.0
        >>> convolution_norm(box, (8, 8), padding=1) < 0.95
        True
    """
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(f"padding_mode={padding_mode!r} has no bound here; 'zeros' and 'circular' have one")
    kernel = weight.shape[2:]
    dims = len(kernel)
    steps = _each(dilation, dims)
    return Convolution(
        weight.detach().cpu().double(),
        tuple(size),
        _each(stride, dims),
        resolve_padding(padding, tuple(kernel), steps),
        steps,
        groups,
        padding_mode == "circular",
    ).norm(tolerance)


def resolve_padding(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return (before, after) by dimension, with ``"same"`` and ``"valid"`` spelt out as PyTorch has them."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r} is neither 'same' nor 'valid'")
    return tuple((p, p) for p in _each(padding, len(kernel)))


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


def _transfer_matrices(
    weight: Tensor, torus: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Iterator[Tensor]:
    """Yield batches (F * groups, out / groups, in / groups * prod(stride)) of blocks for all frequencies up to conjugation."""
    tables = [_exponentials(n, k, d) for n, k, d in zip(torus, weight.shape[2:], dilation, strict=True)]
    coarse = [n // s for n, s in zip(torus, stride, strict=True)]
    # Real weights: the block at -nu is the conjugate of the block at nu with its columns permuted, so half a dimension will do.
    kept = [*coarse[:-1], coarse[-1] // 2 + 1]
    grouped = weight.to(torch.complex128).reshape(groups, -1, *weight.shape[1:])
    entries = weight.numel() // math.prod(weight.shape[2:]) * math.prod(stride) * math.prod(kept[1:])
    rows = max(1, _CHUNK_ENTRIES // max(1, entries))
    for start in range(0, kept[0], rows):
        frequencies = [range(start, min(start + rows, kept[0])), *[range(k) for k in kept[1:]]]
        blocks = []
        for alias in itertools.product(*[range(s) for s in stride]):
            chosen = [
                table[torch.tensor([(f + j * c) % n for f in fs])]
                for table, fs, j, c, n in zip(tables, frequencies, alias, coarse, torus, strict=True)
            ]
            blocks.append(_transform(grouped, chosen))
        yield torch.cat(blocks, -1).flatten(0, -3) / math.sqrt(math.prod(stride))


def _transform(grouped: Tensor, tables: list[Tensor]) -> Tensor:
    """Contract the taps of (groups, out, in, k_1, ..., k_d) with tables (F_i, k_i): (F_1, ..., F_d, groups, out, in)."""
    result = grouped
    for table in reversed(tables):
        # The last tap dimension goes away and its frequencies come to the front.
        result = torch.tensordot(table, result, dims=([1], [result.dim() - 1]))
    return result


def _exponentials(n: int, k: int, dilation: int) -> Tensor:
    phase = (torch.arange(n)[:, None] * (torch.arange(k) * dilation)[None, :]) % n
    angle = phase.to(torch.float64) * (2.0 * math.pi / n)
    return torch.complex(torch.cos(angle), torch.sin(angle))
