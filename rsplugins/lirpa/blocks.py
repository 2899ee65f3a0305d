"""Blocks linear-relu-linear in auto-LiRPA's graph, with batch normalisation and flattening seen through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsplugins.compat import bridge_auto_lirpa
from rsplugins.lirpa.deviation import Ball, Convolution, Dense, Layer

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import (  # noqa: E402
    BoundBatchNormalization,
    BoundConv,
    BoundFlatten,
    BoundLinear,
    BoundRelu,
    BoundReshape,
    Interval,
)


@dataclass(frozen=True)
class Block:
    """An affine layer, a ReLU, and the affine layer that closes the block.

    Attributes:
        first: the node of the opening layer.
        normalised: the node of the batch normalisation after it, or None.
        relu: the node of the ReLU.
    """

    first: Any
    normalised: Any | None
    relu: Any

    @property
    def opening(self) -> Layer:
        """The opening layer, batch normalisation folded in: it is affine by channel."""
        layer = layer_of(self.first)
        return layer if self.normalised is None else _normalised(layer, self.normalised)

    @property
    def opening_sizes(self) -> Layer:
        """What the opening layer's rounding is relative to: its absolute values, before what batch normalisation cancels."""
        layer = layer_of(self.first).sizes()
        return layer if self.normalised is None else _normalised(layer, self.normalised, sizes=True)

    @property
    def constants(self) -> list[Any]:
        """The nodes of the weights."""
        return [*self.first.inputs[1:], *(self.normalised.inputs[1:] if self.normalised is not None else [])]

    @property
    def preactivation(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds before the ReLU."""
        lower, upper = (self.normalised or self.first).interval
        return lower, upper

    @property
    def center_and_ball(self) -> tuple[Tensor, Ball]:
        """Where the block's input lies."""
        interval = self.first.inputs[0].interval
        order, eps = Interval.get_perturbation(interval)[:2]
        lower, upper = interval
        if order == float("inf"):
            return (lower + upper) / 2, Ball((upper - lower) / 2)
        return lower, Ball(torch.ones_like(lower), float(order), eps)

    @property
    def is_bounded(self) -> bool:
        """Whether the bounds that the block needs are there: auto-LiRPA deletes some while it computes CROWN bounds."""
        return all(hasattr(node, "interval") for node in (self.first.inputs[0], self.normalised or self.first))


def find_block(node: Any) -> Block | None:
    """Return the block that a linear or convolution node closes, or None when what is before it is something else.

    Flattening before a linear node and batch normalisation (eval mode) before the ReLU belong to the block. Average pooling,
    residual additions and everything else end it: plain interval bounds go on from there.
    """
    source = node.inputs[0]
    while isinstance(node, BoundLinear) and isinstance(source, (BoundFlatten, BoundReshape)):
        source = source.inputs[0]
    if type(source) is not BoundRelu:  # its subclasses are other functions
        return None
    before = source.inputs[0]
    normalised = before if isinstance(before, BoundBatchNormalization) and not before.training else None
    first = before.inputs[0] if normalised is not None else before
    if not _is_affine(node) or not _is_affine(first):
        return None
    if isinstance(node, BoundConv) and not isinstance(first, BoundConv):
        return None
    return Block(first, normalised, source)


def layer_of(node: Any) -> Layer:
    """Return the weights of a linear or convolution node."""
    weight, *bias = (_constant(parameter) for parameter in node.inputs[1:])
    if isinstance(node, BoundConv):
        pairs = ((int(pair[0]), int(pair[1])) for pair in (node.stride, node.padding, node.dilation))
        stride, padding, dilation = pairs
        return Convolution(weight, bias[0] if bias else None, stride, padding, dilation, int(node.groups))
    _, weight, shift = node._preprocess(None, weight, bias[0] if bias else None)
    return Dense(weight, shift)


def _is_affine(node: Any) -> bool:
    if not isinstance(node, (BoundConv, BoundLinear)) or any(parameter.perturbed for parameter in node.inputs[1:]):
        return False
    if isinstance(node, BoundConv):
        return len(node.stride) == 2
    return len(node.output_shape) == 2 and not node.transA and float(node.attr.get("alpha", 1.0)) == 1.0


def _constant(node: Any) -> Tensor:
    value: Tensor = node.forward(*(_constant(parent) for parent in node.inputs))
    return value


def _normalised(layer: Layer, node: Any, *, sizes: bool = False) -> Layer:
    weight, bias, mean, variance = (_constant(parameter) for parameter in node.inputs[1:5])
    if sizes:
        weight, bias, mean = weight.abs(), bias.abs(), -mean.abs()
    scale = weight / torch.sqrt(variance + node.eps)
    shift = bias - mean * scale if layer.bias is None else bias + (layer.bias - mean) * scale
    if isinstance(layer, Dense):
        return Dense(layer.weight * scale.unsqueeze(1), shift)
    return Convolution(layer.weight * scale.view(-1, 1, 1, 1), shift, layer.stride, layer.padding, layer.dilation, layer.groups)
