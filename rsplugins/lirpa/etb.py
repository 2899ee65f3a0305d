r"""Expected tight bounds as auto-LiRPA operators, and a sound form of them.

A block is :math:`g(x) = A_2\,\mathrm{relu}(A_1 x + b_1) + b_2`, over a box with centre c and half-widths d, with pre-activations
between l and u.

* ETB (Alsubaihi, Bibi, Alfadly, Hamdi, Ghanem, arXiv 1905.12418): with :math:`M = \mathrm{diag}(1\{u \ge 0\})`, the bounds
  :math:`A_2 M (A_1 c + b_1) + b_2 \mp |A_2 M A_1|\,d`. Unstable neurons pass through as if they were active, so the bounds are
  not sound: :math:`|x| = \mathrm{relu}(x) + \mathrm{relu}(-x)` on [-1, 1] gets [0, 0]. ESTIMATE.
* Sound ETB (ours): an unstable neuron is :math:`\mathrm{relu}(z) = s z + r`. Passed through, s = 1 and r lies in [0, -l]; along
  its chord, s = u / (u - l) and r lies in [0, -s l], which is never more and often several times less, and is the default. With
  :math:`S = \mathrm{diag}(s)` (1 where active, 0 where inactive) the bounds are those of ETB with S for M, the upper one plus
  :math:`\max(A_2, 0)(-S l)` and the lower one plus :math:`\min(A_2, 0)(-S l)` over the unstable neurons; then both are
  intersected with interval bounds, so they are never wider. On the example the chord gives [0, 1], the truth. DETERMINISTIC.

Deep networks go block by block. ETB's blocks do not overlap, as published: the layer after a block starts the next one, from its
box. Sound ETB closes a block at every layer, which is sound and tighter. For an l2 or l1 ball at the input, the row norms of the
first block are taken in the dual norm.

The operators are passed to one BoundedModule through ``custom_ops``; see :data:`ETB` and :data:`SOUND_ETB`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rsplugins.arithmetic import rounding_error as error
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.lirpa.blocks import Block, find_block, layer_of
from rsplugins.lirpa.deviation import Bounds, Convolution, Dense, Layer, Slope, expected_bounds, sound_bounds
from rsplugins.lirpa.outward import Outward, merged

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import BoundConv, BoundLinear, BoundMatMul  # noqa: E402


def estimate(closing: Layer, block: Block) -> Bounds:
    """Return ETB's bounds of a block: not sound."""
    return expected_bounds(closing, block.opening, *block.center_and_ball, block.preactivation)


def sound(closing: Layer, block: Block, slope: Slope = "chord") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sound bounds of a block, not yet intersected with interval bounds, and the neurons' slopes and gaps."""
    return sound_bounds(closing, block.opening, *block.center_and_ball, block.preactivation, slope)


def rounding(closing: Layer, terms: int, block: Block, slopes: Tensor, gap: Tensor) -> Tensor:
    """Return what the bounds of :func:`sound` are off by, by their rounding.

    Args:
        closing: the absolute values of the closing layer.
        terms: how many products each of its weights is a sum of.
        block: the rest of the block.
        slopes: of the neurons.
        gap: between the neurons and their slopes, at most.
    """
    opening, (center, ball) = block.opening_sizes, block.center_and_ball
    largest = center.abs() + ball.weights * ball.eps
    magnitude = closing.apply(slopes * opening.apply(largest) + gap)
    inner, outer = closing.fan_in, opening.fan_in
    # A row of the Jacobian has no more entries than the input, and none outside the taps of both layers.
    entries = ball.weights[0].numel()
    if isinstance(closing, Convolution) and isinstance(opening, Convolution):
        entries = min(entries, opening.fan_in * opening.groups * closing.weight[0, 0].numel())
    return error(2 * (inner + outer + entries + terms) + 64, magnitude)


class _Etb:
    """Interval propagation of ETB: not sound, an estimate."""

    estimate: ClassVar[bool] = True

    def interval_propagate(self: Any, *v: Any, C: Tensor | None = None) -> Any:
        """Bound this node's output from its inputs' intervals, with the specification ``C`` merged in when there is one."""
        block = find_block(self)
        if block is None or _closes(block.first) or not block.is_bounded:
            return _plain(self, v, C)
        return estimate(_specified(layer_of(self), C), block)


class _SoundEtb:
    """Interval propagation of sound ETB: never wider than plain interval bounds."""

    slope: ClassVar[Slope] = "chord"
    rounds_itself: ClassVar[bool] = True
    outward: Outward | None = None

    def interval_propagate(self: Any, *v: Any, C: Tensor | None = None) -> Any:
        """Bound this node's output from its inputs' intervals, with the specification ``C`` merged in when there is one."""
        outward = self.outward
        low, high = _plain(self, v, C) if outward is None else outward.widened(self, v, lambda: _plain(self, v, C), C)
        block = find_block(self)
        if block is None or not block.is_bounded or not _is_exact(self, block, outward):
            return low, high
        closing = layer_of(self)
        other_low, other_high, slopes, gap = sound(_specified(closing, C), block, self.slope)
        if outward is not None and outward.active:
            with torch.no_grad():
                terms, sizes = _specified_sizes(closing, C)
                off = rounding(sizes, terms, block, slopes, gap)
            other_low, other_high = other_low - off, other_high + off
        return torch.maximum(low, other_low), torch.minimum(high, other_high)


def _plain(node: Any, v: Any, C: Tensor | None) -> Bounds:
    kind = BoundConv if isinstance(node, BoundConv) else BoundLinear
    low, high = kind.interval_propagate(node, *v, **({} if C is None else {"C": C}))
    return low, high


def _closes(node: Any) -> bool:
    """Whether an ETB block ends at a node, so that the next one has to start there."""
    if not isinstance(node, _Etb):
        return False
    block = find_block(node)
    return block is not None and not _closes(block.first)


def _specified(layer: Layer, C: Tensor | None) -> Layer:
    if C is None:
        return layer
    assert isinstance(layer, Dense)  # auto-LiRPA merges a specification into linear nodes only
    return Dense(C @ layer.weight, None if layer.bias is None else C @ layer.bias)


def _specified_sizes(layer: Layer, C: Tensor | None) -> tuple[int, Layer]:
    sizes = layer.sizes()
    if C is None or not isinstance(sizes, Dense):
        return 0, sizes
    terms, weight, bias = merged(C, sizes.weight, sizes.bias)
    return terms, Dense(weight, bias)


def _is_exact(node: Any, block: Block, outward: Outward | None) -> bool:
    """Whether no weight of a block is itself computed, with rounding of its own; interval bounds account for that."""
    return outward is None or all(outward.radius(constant) is None for constant in (*node.inputs[1:], *block.constants))


class EtbLinear(_Etb, BoundLinear):  # type: ignore[misc]
    """``onnx::Gemm`` with expected tight bounds. ESTIMATE."""


class EtbMatMul(_Etb, BoundMatMul):  # type: ignore[misc]
    """``onnx::MatMul``, which a linear layer without bias becomes, with expected tight bounds. ESTIMATE."""


class EtbConv(_Etb, BoundConv):  # type: ignore[misc]
    """``onnx::Conv`` with expected tight bounds. ESTIMATE."""


class SoundEtbLinear(_SoundEtb, BoundLinear):  # type: ignore[misc]
    """``onnx::Gemm`` with sound expected tight bounds. DETERMINISTIC."""


class SoundEtbMatMul(_SoundEtb, BoundMatMul):  # type: ignore[misc]
    """``onnx::MatMul`` with sound expected tight bounds. DETERMINISTIC."""


class SoundEtbConv(_SoundEtb, BoundConv):  # type: ignore[misc]
    """``onnx::Conv`` with sound expected tight bounds. DETERMINISTIC."""


class _PassThrough:
    slope: ClassVar[Slope] = "pass"


class PassThroughLinear(_PassThrough, SoundEtbLinear):
    """``onnx::Gemm`` with sound expected tight bounds, unstable neurons passed through. DETERMINISTIC."""


class PassThroughMatMul(_PassThrough, SoundEtbMatMul):
    """``onnx::MatMul`` with sound expected tight bounds, unstable neurons passed through. DETERMINISTIC."""


class PassThroughConv(_PassThrough, SoundEtbConv):
    """``onnx::Conv`` with sound expected tight bounds, unstable neurons passed through. DETERMINISTIC."""


ETB = {"onnx::Gemm": EtbLinear, "onnx::MatMul": EtbMatMul, "onnx::Conv": EtbConv}
"""Operators of expected tight bounds, block by block. ESTIMATE."""
SOUND_ETB = {"onnx::Gemm": SoundEtbLinear, "onnx::MatMul": SoundEtbMatMul, "onnx::Conv": SoundEtbConv}
"""Operators of sound expected tight bounds. DETERMINISTIC."""
PASS_THROUGH = {"onnx::Gemm": PassThroughLinear, "onnx::MatMul": PassThroughMatMul, "onnx::Conv": PassThroughConv}
"""Operators of sound expected tight bounds in their first form, unstable neurons passed through. DETERMINISTIC."""
