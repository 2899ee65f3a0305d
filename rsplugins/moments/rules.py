"""Moment rules: what each of auto-LiRPA's bound operators does to a Gaussian, keyed by the operator's class name.

The class itself is not needed: both releases of auto-LiRPA use these names, and a rule for an operator that only one of them has
does no harm. A subclass inherits no rule (BoundAtan derives from BoundTanh).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.errors import ParameterError
from rsplugins.moments.activations import Activation, LeakyRelu
from rsplugins.moments.operations import Combination, Concatenation, Elementwise, Linear, Map, Maximum, Operation


@dataclass(frozen=True)
class Site:
    """An operator in its place in the graph, as a rule is given it.

    Attributes:
        node: auto-LiRPA's node; its ``forward`` and its attributes may be read.
        values: for each input of the node, its value when it is a constant (weights, shapes), None when it is random.
        before: shape of the first random input, without the batch.
        after: shape of the output, without the batch.
    """

    node: Any
    values: tuple[Tensor | None, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def constant(self, position: int) -> Tensor:
        """Return an input's value.

        Raises:
            ParameterError: when that input is random: there is no rule for products of random values, say.
        """
        value = self.values[position] if position < len(self.values) else None
        if value is None:
            raise ParameterError(
                f"Operator {type(self.node).__name__} at {self.node.name} needs a constant, and the model has none there.",
                cause="moment rules exist for operators with constant weights.",
                fix="Rewrite that part with linear layers, activations, pooling, additions and concatenations.",
            )
        return value


Rule: TypeAlias = Callable[[Site], Operation]


def convolution(site: Site) -> Linear:
    """A convolution in one or two dimensions; see :func:`convolved`."""
    node = site.node
    bias = site.values[2] if len(site.values) > 2 else None
    return convolved(site.constant(1), bias, node.stride, node.padding, node.dilation, node.groups)


def convolved(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Linear:
    """Return a convolution with weights (O, I / groups, *kernel) in one or two dimensions.

    The covariance of an output position when input positions are independent is the sum over the taps of W_t S W_t^T (Zhen,
    Chakraborty, Singh, CVPR 2021); exact where the window does not touch the padding.
    """
    run: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    options = (stride, padding, dilation, groups)
    offset: Tensor | float = 0.0 if bias is None else bias.view(1, -1, *(1,) * (weight.dim() - 2))

    def matrices() -> Tensor:
        blocks = weight.flatten(2).chunk(groups, 0)
        outputs, inputs, taps = blocks[0].shape
        dense = weight.new_zeros(taps, outputs * groups, inputs * groups)
        for group, block in enumerate(blocks):
            dense[:, group * outputs : (group + 1) * outputs, group * inputs : (group + 1) * inputs] = block.permute(2, 0, 1)
        return dense

    def aligned(rows: Tensor) -> Tensor:
        sizes = weight.shape[2:]
        at = [around // step for around, step in zip(padding, dilation, strict=True)]
        if any(place >= size for place, size in zip(at, sizes, strict=True)):
            return torch.zeros(len(rows), weight.shape[0], rows.shape[-1], dtype=rows.dtype, device=rows.device)
        tap = at[0] if len(at) == 1 else at[0] * sizes[1] + at[1]
        return matrices()[tap] @ rows

    return Linear(
        apply=lambda x: run(x, weight, None, *options),
        squared=lambda v: run(v, weight.square(), None, *options),
        offset=offset,
        mixing=lambda covariance: _summed(matrices(), covariance),
        aligned=aligned,
        taps=math.prod(weight.shape[2:]),
    )


def dense(site: Site) -> Linear:
    """A matrix product with a constant; see :func:`multiplied`."""
    node = site.node
    one, weight, bias = node._preprocess(torch.ones(1, 1), site.constant(1), site.values[2] if len(site.values) > 2 else None)
    return multiplied(weight * one.to(weight).reshape(()), bias)


def product(site: Site) -> Linear:
    """``x @ w`` with a constant w, which is what a linear layer without a bias becomes; see :func:`multiplied`."""
    weight = site.constant(1)
    if weight.dim() != 2 or len(site.before) != 1:
        raise ParameterError(
            f"There is no moment rule for products of shapes {site.before} and {tuple(weight.shape)} (at {site.node.name}).",
            cause="linear layers on tokens or on the last of several dimensions: the rule is for vectors.",
            fix="Flatten before the linear layer, or use a convolution with a kernel of 1.",
        )
    return multiplied(weight.t(), None)


def multiplied(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return a linear layer with weights (O, I); after flattening it sums over the positions of every channel."""

    def mixing(covariance: Tensor) -> Tensor:
        return _summed(weight.view(len(weight), covariance.shape[-1], -1).permute(2, 0, 1), covariance)

    return Linear(
        apply=lambda x: x @ weight.t(),
        squared=lambda v: v @ weight.square().t(),
        offset=0.0 if bias is None else bias,
        mixing=mixing,
        aligned=lambda rows: weight @ rows,
        taps=0,  # as many as there are positions, which only the representation knows
        rows=lambda rows: rows @ weight,
    )


def _summed(taps: Tensor, covariance: Tensor) -> Tensor:
    """Return the sum over t of W_t S W_t^T for taps (T, O, I) and S (B, I, I)."""
    count, outputs, inputs = taps.shape
    # One large product over all taps and images: many small ones are several times slower.
    left = taps.reshape(-1, inputs) @ covariance.transpose(0, 1).reshape(inputs, -1)
    rows = left.view(count, outputs, -1, inputs).permute(2, 1, 0, 3).flatten(2)
    return rows @ taps.transpose(0, 1).flatten(1).t()


def scaling(factor: Tensor, offset: Tensor | float, shape: tuple[int, ...]) -> Linear:
    """Return factor * x + offset, elementwise; both broadcast to the shape (without the batch)."""
    full = torch.broadcast_to(factor, shape).flatten(1) if len(shape) > 1 else torch.broadcast_to(factor, shape).unsqueeze(1)

    def by_channel() -> Tensor:
        if not bool((full == full[:, :1]).all()):
            raise ParameterError(
                "A factor differs from position to position of one channel.",
                cause="the representation 'channel' has one covariance for all positions.",
                fix="Use representation='low-rank' or 'full'.",
            )
        return full[:, 0]

    def outer(covariance: Tensor) -> Tensor:
        value = _grouped(by_channel(), covariance.shape[-1])
        return covariance * value.unsqueeze(-1) * value.unsqueeze(-2)

    return Linear(
        apply=lambda x: x * factor,
        squared=lambda v: v * factor.square(),
        offset=offset,
        mixing=outer,
        aligned=lambda rows: rows * _grouped(by_channel(), rows.shape[-2]).unsqueeze(-1),
        pointwise=True,
    )


def _grouped(values: Tensor, channels: int) -> Tensor:
    # After flattening there are more features than channels; the features of one channel lie side by side.
    if len(values) == channels:
        return values
    groups = values.view(channels, -1)
    if not bool((groups == groups[:, :1]).all()):
        raise ParameterError(
            "A factor after flattening differs from position to position of one channel.",
            fix="Use representation='low-rank' or 'full'.",
        )
    return groups[:, 0]


def normalisation(site: Site) -> Linear:
    """Batch normalisation in eval mode: an affine map of every channel."""
    weight, bias, mean, variance = (site.constant(position) for position in range(1, 5))
    factor = weight / (variance + site.node.eps).sqrt()
    trailing = (1,) * (len(site.before) - 1)
    return scaling(factor.view(-1, *trailing), (bias - mean * factor).view(-1, *trailing), site.before)


def _broadcastable(site: Site, position: int) -> Tensor:
    value = site.constant(position).to(torch.get_default_dtype() if not site.constant(position).is_floating_point() else None)
    if value.dim() > len(site.before):  # the constant has a batch dimension of its own
        value = value[0]
    return value


def addition(site: Site) -> Operation:
    """The sum of two nodes, or of a node and a constant."""
    return _sum(site, 1.0)


def subtraction(site: Site) -> Operation:
    """The difference of two nodes, or of a node and a constant."""
    return _sum(site, -1.0)


def _sum(site: Site, sign: float) -> Operation:
    if all(value is None for value in site.values):
        return Combination((1.0, sign))
    position = 0 if site.values[0] is not None else 1
    value = _broadcastable(site, position)
    one = torch.ones((), dtype=value.dtype, device=value.device)
    return scaling(one * sign if position == 0 else one, value if position == 0 else sign * value, site.before)


def multiplication(site: Site) -> Linear:
    """The product of a node and a constant."""
    position = 0 if site.values[0] is not None else 1
    return scaling(_broadcastable(site, position), 0.0, site.before)


def division(site: Site) -> Linear:
    """A node over a constant."""
    return scaling(1 / _broadcastable(site, 1), 0.0, site.before)


def negation(site: Site) -> Linear:
    """-x."""
    return scaling(torch.tensor(-1.0), 0.0, site.before)


def rearrangement(site: Site) -> Linear:
    """Flatten, reshape, squeeze, unsqueeze, casts; see :func:`rearranged`."""
    shape = site.after
    # Only where the channels stay the leading dimension do (C, C) covariances mean the same afterwards.
    return rearranged(lambda x: x.reshape(-1, *shape), by_channel=len(shape) == 1 or shape[0] == site.before[0])


def rearranged(apply: Map, *, by_channel: bool = True) -> Linear:
    """Return the map to the same numbers in another shape; ``by_channel`` when the features of a channel stay side by side."""

    def keep(x: Tensor) -> Tensor:
        return x

    return Linear(apply, apply, mixing=keep if by_channel else None, aligned=keep if by_channel else None, pointwise=True)


def mean_pooling(site: Site) -> Linear:
    """Average pooling, global or in windows, and means over dimensions: every output averages k inputs with weight 1/k."""
    node = site.node
    constants = [value for value in site.values if value is not None]
    kernel = getattr(node, "kernel_size", None)
    taps = math.prod(kernel) if kernel is not None else math.prod(site.before) // math.prod(site.after)

    def apply(x: Tensor) -> Tensor:
        found: Tensor = node.forward(x, *constants)
        return found

    return Linear(
        apply,
        lambda v: apply(v) / taps,
        mixing=lambda covariance: covariance / taps,
        aligned=lambda rows: rows / taps,
        taps=taps,
    )


def max_pooling(site: Site) -> Maximum:
    """Max pooling in windows."""
    node = site.node
    channels, *sizes = site.before
    size, stride, padding = tuple(node.kernel_size), tuple(node.stride), tuple(node.padding)
    # 1 + index, so that the zeros of the padding come out as -1
    index = torch.arange(1, math.prod(site.before) + 1, dtype=torch.float64).view(channels, 1, *sizes)
    windows = F.unfold(index, size, padding=padding, stride=stride).round().long() - 1
    views = windows.permute(1, 0, 2).reshape(math.prod(size), -1)
    return Maximum(list(views), site.after)


def concatenation(site: Site) -> Concatenation:
    """torch.cat of random nodes."""
    if any(value is not None for value in site.values):
        raise ParameterError("There is no moment rule for concatenating constants.", fix="Concatenate layer outputs only.")
    axis = int(site.node.axis)
    return Concatenation(axis if axis > 0 else axis + len(site.after) + 1)


def leaky(site: Site) -> Elementwise:
    """Leaky ReLU; its slope is read off its value at -1."""
    return Elementwise(LeakyRelu(-float(site.node.forward(torch.tensor([-1.0], dtype=torch.float64)))))


RULES: Mapping[str, Rule] = {
    "BoundAdd": addition,
    "BoundAveragePool": mean_pooling,
    "BoundBatchNormalization": normalisation,
    "BoundCast": rearrangement,
    "BoundConcat": concatenation,
    "BoundConv": convolution,
    "BoundDiv": division,
    "BoundDropout": rearrangement,
    "BoundFlatten": rearrangement,
    "BoundGlobalAveragePool": mean_pooling,
    "BoundIdentity": rearrangement,
    "BoundLeakyRelu": leaky,
    "BoundLinear": dense,
    "BoundMatMul": product,
    "BoundMaxPool": max_pooling,
    "BoundMul": multiplication,
    "BoundNeg": negation,
    "BoundReduceMean": mean_pooling,
    "BoundRelu": lambda site: Elementwise(LeakyRelu()),
    "BoundReshape": rearrangement,
    "BoundSigmoid": lambda site: Elementwise(Activation(torch.sigmoid)),
    "BoundSqueeze": rearrangement,
    "BoundSub": subtraction,
    "BoundTanh": lambda site: Elementwise(Activation(torch.tanh)),
    "BoundUnsqueeze": rearrangement,
}
"""The built-in rules. Plugins add theirs through the hook ``rsplugins_moment_rules``, never by writing here."""
