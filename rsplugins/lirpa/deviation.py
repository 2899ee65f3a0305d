r"""Norms of the rows of a block's Jacobian :math:`J = A_2\,\mathrm{diag}(s)\,A_1`; a convolution never becomes a dense matrix.

Pure torch: nothing here knows auto-LiRPA. For a ball of radius eps the deviation of output i is
:math:`\varepsilon \lVert J_i \rVert_*` in the dual norm; for a box with half-widths d it is :math:`\sum_j |J_{ij}| d_j`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24
"""Elements of an intermediate tensor, at most about this many."""

Pair = tuple[int, int]
Bounds = tuple[Tensor, Tensor]
Slope = Literal["chord", "pass"]
"""What an unstable neuron is replaced by: its chord, or a pass-through."""


@dataclass(frozen=True)
class Dense:
    """A linear layer on flattened inputs.

    Attributes:
        weight: (S, n), or (B, S, n) when it differs by input, as it does after a specification is merged in.
        bias: (S,) or (B, S), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def fan_in(self) -> int:
        """How many products an output is a sum of."""
        return int(self.weight.shape[-1])

    def apply(self, x: Tensor) -> Tensor:
        """Return weight @ x + bias, (B, S), of x (B, ...)."""
        result = torch.einsum("...sn,...n->...s", self.weight, x.flatten(1))
        return result if self.bias is None else result + self.bias

    def sizes(self) -> Dense:
        """Return the layer of the weights' and biases' absolute values."""
        return Dense(self.weight.abs(), None if self.bias is None else self.bias.abs())

    def sided(self, x: Tensor, sign: int) -> Tensor:
        """Apply only the weights of one sign, without the bias."""
        return Dense(_one_sign(self.weight, sign)).apply(x)


@dataclass(frozen=True)
class Convolution:
    """A 2-d convolution.

    Attributes:
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,), or None.
        stride: of both axes, as are padding (zeros) and dilation.
        groups: as torch has them.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def fan_in(self) -> int:
        """How many products an output is a sum of."""
        return self.weight[0].numel()

    def apply(self, x: Tensor) -> Tensor:
        """Return the convolution of x (B, C_in, H, W)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def sizes(self) -> Convolution:
        """Return the layer of the weights' and biases' absolute values."""
        return replace(self, weight=self.weight.abs(), bias=None if self.bias is None else self.bias.abs())

    def sided(self, x: Tensor, sign: int) -> Tensor:
        """Apply only the weights of one sign, without the bias."""
        return F.conv2d(x, _one_sign(self.weight, sign), None, self.stride, self.padding, self.dilation, self.groups)

    def transposed(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return rows (N, C_out, H1, W1) times the convolution as a matrix, (N, C_in, H0, W0) for ``shape`` (C_in, H0, W0)."""
        kernel = self.weight.shape[2:]
        left_over = [
            shape[axis + 1]
            - (
                (rows.shape[axis + 2] - 1) * self.stride[axis]
                - 2 * self.padding[axis]
                + self.dilation[axis] * (kernel[axis] - 1)
                + 1
            )
            for axis in (0, 1)
        ]
        return F.conv_transpose2d(
            rows,
            self.weight,
            None,
            self.stride,
            self.padding,
            left_over,
            self.groups,
            self.dilation,
        )

    def taps(self) -> Tensor:
        """Return the kernel over all pairs of channels, (C_out, C_in, kh * kw), zero between groups."""
        if self.groups == 1:
            return self.weight.flatten(2)
        parts = self.weight.flatten(2).chunk(self.groups)
        return torch.stack([_diagonal([part[..., tap] for part in parts]) for tap in range(parts[0].shape[2])], -1)


Layer = Dense | Convolution


@dataclass(frozen=True)
class Ball:
    """Where a block's input lies.

    Attributes:
        weights: (B, ...) half-widths of the box; ones for an l2 or l1 ball.
        order: of the norm: inf for a box, 2 or 1.
        eps: radius of the l2 or l1 ball; 1 for a box.
    """

    weights: Tensor
    order: float = math.inf
    eps: float | Tensor = 1.0

    def start(self, rows: Tensor) -> Tensor:
        """Return what nothing deviates by."""
        return torch.zeros_like(rows)

    def add(self, total: Tensor, jacobian: Tensor, weights: Tensor, dim: int) -> Tensor:
        """Take more columns of the Jacobian into the total, along ``dim``."""
        part = (jacobian * weights).abs()
        if self.order == 1:
            return torch.maximum(total, part.amax(dim))
        return total + (part if self.order == math.inf else part.square()).sum(dim)

    def finish(self, total: Tensor) -> Tensor:
        """Return the deviation."""
        return self.eps * (total.sqrt() if self.order == 2 else total)


def deviation(closing: Layer, slopes: Tensor, opening: Layer, ball: Ball) -> Tensor:
    r"""Return by how much each output of the block can deviate from its centre while the neurons keep their slopes.

    Args:
        closing: :math:`A_2`.
        slopes: s, of shape (B, ...) as the output of ``opening``.
        opening: :math:`A_1`; a convolution closes only over a convolution.
        ball: of the block's input.

    Returns:
        :math:`\lVert J_i \rVert_*`-weighted radius of each output, of the shape of ``closing``'s output.

    Example:
        >>> box = Ball(torch.full((1, 1), 0.5))
        >>> deviation(Dense(torch.tensor([[1.0, 1.0]])), torch.ones(1, 2), Dense(torch.tensor([[1.0], [-1.0]])), box)
        tensor([[0.]])
    """
    if isinstance(closing, Convolution):
        if not isinstance(opening, Convolution):
            raise TypeError("a convolution closes a block that another convolution opens")
        return ball.finish(_conv_conv(closing, slopes, opening, ball))
    batch = len(slopes)
    size = max(slopes[0].numel(), ball.weights[0].numel())
    rows = max(1, CHUNK // (batch * size))
    parts = [
        _dense(closing.weight[..., i : i + rows, :], slopes, opening, ball) for i in range(0, closing.weight.shape[-2], rows)
    ]
    return ball.finish(torch.cat(parts, 1))


def _dense(weight: Tensor, slopes: Tensor, opening: Layer, ball: Ball) -> Tensor:
    """Rows of a linear closing layer, chunk by chunk: each is pulled back through the opening layer."""
    pulled = weight * slopes.flatten(1).unsqueeze(1)
    if isinstance(opening, Dense):
        jacobian = pulled @ opening.weight
    else:
        batch, rows = pulled.shape[:2]
        images = opening.transposed(pulled.reshape(batch * rows, *slopes.shape[1:]), tuple(ball.weights.shape[1:]))
        jacobian = images.reshape(batch, rows, -1)
    return ball.add(ball.start(jacobian[..., 0]), jacobian, ball.weights.flatten(1).unsqueeze(1), dim=2)


def _conv_conv(closing: Convolution, slopes: Tensor, opening: Convolution, ball: Ball) -> Tensor:
    r"""Two convolutions with slopes between them.

    The entry of J from input channel c at a fixed offset to output channel o at position p is
    :math:`\sum_{m,t} A_2[o,m,t]\, s[m, p+t]\, A_1[m,c,\text{offset}-t]`: for each (c, offset) a convolution of the slopes with a
    kernel that does not depend on the input. So J is visited offset by offset, as matrix products over the unfolded slopes, and
    only its running norm is kept.
    """
    batch, width = slopes.shape[0], ball.weights.shape[1]
    kernel = (int(closing.weight.shape[2]), int(closing.weight.shape[3]))
    size = [_out(slopes.shape[axis + 2], kernel[axis], closing, axis) for axis in (0, 1)]
    unfolded = F.unfold(slopes, kernel, closing.dilation, closing.padding, closing.stride)
    unfolded = unfolded.view(batch, slopes.shape[1], -1, size[0] * size[1])
    offsets = list(_offsets(closing, opening))
    shifted = _shifts(closing, opening, ball.weights, size, offsets)
    outer, inner = closing.taps(), opening.taps()
    step = max(1, CHUNK // (batch * width * size[0] * size[1]))

    def visit(total: Tensor, index: int, first: int) -> Tensor:
        _, pairs = offsets[index]
        far, near = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        kernels = torch.einsum("omn,mcn->ocmn", outer[first : first + step][:, :, far], inner[:, :, near])
        flat = kernels.reshape(-1, kernels.shape[2] * kernels.shape[3])
        jacobian = (flat @ unfolded[:, :, far].reshape(batch, flat.shape[1], -1)).view(batch, -1, width, size[0] * size[1])
        return ball.add(total, jacobian, shifted(index), dim=2)

    parts = []
    for first in range(0, outer.shape[0], step):
        total = slopes.new_zeros(batch, len(outer[first : first + step]), size[0] * size[1])
        for index in range(len(offsets)):
            # Otherwise training would keep the whole of J for the backward pass.
            keep = torch.is_grad_enabled() and (outer.requires_grad or inner.requires_grad or ball.weights.requires_grad)
            total = checkpoint(visit, total, index, first, use_reentrant=False) if keep else visit(total, index, first)
        parts.append(total)
    return torch.cat(parts, 1).view(batch, -1, *size)


def _offsets(closing: Convolution, opening: Convolution) -> Iterator[tuple[Pair, list[Pair]]]:
    """Yield each offset between output and input position, with the pairs of taps (closing, opening) that meet there."""
    (h2, w2), (h1, w1) = closing.weight.shape[2:], opening.weight.shape[2:]
    found: defaultdict[Pair, list[Pair]] = defaultdict(list)
    for far in range(h2 * w2):
        for near in range(h1 * w1):
            row = opening.stride[0] * closing.dilation[0] * (far // w2) + opening.dilation[0] * (near // w1)
            column = opening.stride[1] * closing.dilation[1] * (far % w2) + opening.dilation[1] * (near % w1)
            found[row, column].append((far, near))
    yield from found.items()


def _shifts(
    closing: Convolution, opening: Convolution, weights: Tensor, size: list[int], offsets: list[tuple[Pair, list[Pair]]]
) -> _Shifted:
    stride = [opening.stride[axis] * closing.stride[axis] for axis in (0, 1)]
    before = [opening.stride[axis] * closing.padding[axis] + opening.padding[axis] for axis in (0, 1)]
    reach = [stride[axis] * (size[axis] - 1) + 1 for axis in (0, 1)]
    largest = [max(offset[axis] for offset, _ in offsets) for axis in (0, 1)]
    after = [max(0, largest[axis] + reach[axis] - before[axis] - weights.shape[axis + 2]) for axis in (0, 1)]
    padded = F.pad(weights, (before[1], after[1], before[0], after[0]))
    return _Shifted(padded, stride, reach, [offset for offset, _ in offsets])


@dataclass(frozen=True)
class _Shifted:
    """The input's weights as each output position sees them at one offset; zero outside the image."""

    padded: Tensor
    stride: list[int]
    reach: list[int]
    offsets: list[Pair]

    def __call__(self, index: int) -> Tensor:
        row, column = self.offsets[index]
        seen = self.padded[:, :, row : row + self.reach[0] : self.stride[0], column : column + self.reach[1] : self.stride[1]]
        return seen.flatten(2).unsqueeze(1)


def _out(length: int, kernel: int, layer: Convolution, axis: int) -> int:
    return (length + 2 * layer.padding[axis] - layer.dilation[axis] * (kernel - 1) - 1) // layer.stride[axis] + 1


def _diagonal(blocks: list[Tensor]) -> Tensor:
    result: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return result


def _one_sign(weight: Tensor, sign: int) -> Tensor:
    return weight.clamp(min=0) if sign > 0 else weight.clamp(max=0)


def expected_bounds(closing: Layer, opening: Layer, center: Tensor, ball: Ball, preactivation: Bounds) -> Bounds:
    """Return ETB's bounds of closing(relu(opening(x))) over a ball: unstable neurons count as active. Not sound."""
    upper = preactivation[1]
    return _centered(closing, (upper >= 0).to(upper.dtype), opening, center, ball)


def sound_bounds(
    closing: Layer, opening: Layer, center: Tensor, ball: Ball, preactivation: Bounds, slope: Slope = "chord"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sound bounds of closing(relu(opening(x))) over a ball, up to rounding, and the neurons' slopes and gaps.

    Args:
        closing: the affine layer after the ReLU.
        opening: the affine layer before it.
        center: of the ball.
        ball: its radius.
        preactivation: lower and upper bounds of opening(x).
        slope: what an unstable neuron is replaced by.
    """
    lower, upper = preactivation
    unstable = (lower < 0) & (upper > 0)
    if slope == "pass":
        slopes = ((lower >= 0) | unstable).to(upper.dtype)
    else:
        # The inner `where` keeps a division by zero out of the gradient.
        slopes = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).to(upper.dtype))
    # relu(z) - s z is largest at one of the ends, whatever s in [0, 1] is: it may be a rounded chord's.
    gap = torch.where(unstable, torch.maximum(-lower * slopes, (1 - slopes) * upper), 0.0)
    low, high = _centered(closing, slopes, opening, center, ball)
    return low + closing.sided(gap, -1), high + closing.sided(gap, 1), slopes, gap


def _centered(closing: Layer, slopes: Tensor, opening: Layer, center: Tensor, ball: Ball) -> Bounds:
    middle = closing.apply(slopes * opening.apply(center))
    spread = deviation(closing, slopes, opening, ball)
    return middle - spread, middle + spread
