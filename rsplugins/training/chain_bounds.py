"""Differentiable bounds of a network's margins over a box of raw pixels, for training with them.

Chains of convolutions, linear layers and ReLUs are propagated here, so that such networks train on machines without auto-LiRPA;
every other network goes through :class:`rsplugins.lirpa.network.BoundNetwork`. Both apply the formulas of ``rsplugins.lirpa``.
Training bounds are never certificates: certify with ``--method ibp`` or ``crown-ibp`` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from rsplugins.chain import leaves, stray
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.lirpa.deviation import Ball, Convolution, Dense, Layer, expected_bounds, sound_bounds

Bound = Literal["ibp", "etb", "sound-etb"]
Blocks = Literal["linear", "mixed", "all"]
Interval = tuple[Tensor, Tensor]


class Bounder(Protocol):
    """Bounds a network's outputs times a specification."""

    def lower(self, images: Tensor, eps: float, specification: Tensor, bound: Bound, clip: bool) -> Tensor:
        """Return lower bounds (B, S) of specification (B, S, K) @ logits over the l-infinity ball of raw pixels."""
        ...


def make_bounder(model: nn.Module, example: Tensor, bounds: Sequence[Bound], *, blocks: Blocks = "all") -> Bounder:
    """Return what bounds a model: a chain where it is one, auto-LiRPA otherwise.

    Args:
        model: as hooks see it.
        example: images (B, C, H, W), for their shape.
        bounds: those that will be asked for. auto-LiRPA writes to the weights while it traces them, so it does so now and not
            between a forward and a backward pass.
        blocks: which are bounded, in a chain; see :func:`propagate`.

    Raises:
        ParameterError: not a chain, and auto-LiRPA is not installed, naming the first layer that does not fit; or a chain
            without a block of that kind.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the module there
    reason = stray(model)
    if not reason:
        chain = Chain(model, blocks)
        if blocks != "all" and set(bounds) != {"ibp"} and not chain.has_block():
            raise ParameterError(
                f"The network has no block of the kind {blocks!r}, so the bounds would be those of IBP.",
                cause='"linear" takes linear layer, ReLU, linear layer; "mixed" also lets a convolution open the block.',
                fix='Set blocks = "mixed" or "all", or train with name = "ibp".',
            )
        return chain
    import importlib.util

    if importlib.util.find_spec("auto_LiRPA") is None:
        raise ParameterError(
            f"Bounds of this network need auto-LiRPA: it is not a chain of convolutions, linear layers and ReLUs ({reason}).",
            fix='Install it with: pip install --no-deps "auto-LiRPA>=0.3", or train a plain chain.',
        )
    return _ByAutoLirpa(model, example, bounds)


@dataclass
class Chain:
    """A network that is a chain of affine layers with ReLUs between.

    Attributes:
        model: the module, whose parameters are read at each call.
        blocks: which are bounded; see :func:`propagate`.
    """

    model: nn.Module
    blocks: Blocks = "all"

    def has_block(self) -> bool:
        """Return whether any block is bounded as one."""
        layers, rectified = self.layers()
        pairs = zip(layers, layers[1:], rectified, strict=False)
        return any(follows and _is_block(opening, closing, self.blocks) for opening, closing, follows in pairs)

    def lower(self, images: Tensor, eps: float, specification: Tensor, bound: Bound, clip: bool) -> Tensor:
        """Return lower bounds (B, S) of specification (B, S, K) @ logits."""
        layers, rectified = self.layers()
        last = layers[-1]
        specification = specification.to(self.dtype)
        if not isinstance(last, Dense) or rectified[-1]:
            raise ParameterError("The network has to end with a linear layer.", fix="Leave out what follows it.")
        bias = None if last.bias is None else specification @ last.bias
        layers[-1] = Dense(specification @ last.weight, bias)
        low, _ = propagate(layers, rectified, self.box(images, eps, clip), bound, blocks=self.blocks)[-1]
        return low

    def offsets(self, images: Tensor, eps: float, clip: bool) -> Tensor:
        """Return the released ETB's deviation of each logit, (B, K): rows of one masked Jacobian of the whole network.

        The masks come from interval bounds through all layers: 1 where the upper pre-activation is at least 0.
        """
        layers, rectified = self.layers()
        low, high = self.box(images, eps, clip)
        intervals = propagate(layers, rectified, (low, high), "ibp")
        last = layers[-1]
        assert isinstance(last, Dense)
        rows = last.weight.expand(len(images), *last.weight.shape)
        for position in range(len(layers) - 2, -1, -1):
            if rectified[position]:
                upper = intervals[position][1]
                rows = rows * (upper >= 0).to(rows.dtype).flatten(1).unsqueeze(1)
            layer, before = layers[position], low if position == 0 else intervals[position - 1][0]
            rows = _pull_back(layer, rows, intervals[position][0], before)
        return (rows.abs() @ ((high - low) / 2).flatten(1).unsqueeze(2)).squeeze(2)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which a Classifier casts images to."""
        return next(parameter.dtype for parameter in self.model.parameters())

    def layers(self) -> tuple[list[Layer], list[bool]]:
        """Return the affine layers, and whether a ReLU follows each."""
        layers: list[Layer] = []
        rectified: list[bool] = []
        for module in leaves(self.model):
            if isinstance(module, nn.ReLU):
                rectified[-1] = True
            elif isinstance(module, nn.Linear | nn.Conv2d):
                layers.append(_layer(module))
                rectified.append(False)
        return layers, rectified

    def box(self, images: Tensor, eps: float, clip: bool) -> Interval:
        """Return the box around raw images in the network's own units, where a normalisation maps boxes to boxes."""
        low, high = images - eps, images + eps
        if clip:
            low, high = low.clamp(min=0), high.clamp(max=1)
        if isinstance(self.model, Classifier):
            low, high = self.model.normalised(low), self.model.normalised(high)
        return low.to(self.dtype), high.to(self.dtype)


def propagate(
    layers: list[Layer], rectified: list[bool], box: Interval, bound: Bound, *, blocks: Blocks = "all"
) -> list[Interval]:
    """Return the bounds after each affine layer, before its ReLU.

    Sound ETB closes a block at every layer and intersects with interval bounds; ETB's blocks do not overlap, and the layer after
    a block starts the next one from the block's own (unsound) bounds.

    ``blocks`` says which pairs of layers are bounded as one, the others by intervals: as sound as before, looser, and cheaper by
    orders of magnitude, since a block's price is the product of its two layers. ``"linear"``: two linear layers; ``"mixed"``: any
    layer and a linear one; ``"all"``: two convolutions as well.
    """
    found: list[Interval] = []
    inputs: list[Interval] = []
    opened = False
    current = box
    for position, layer in enumerate(layers):
        inputs.append(current)
        after = _interval(layer, current)
        follows_relu = position > 0 and rectified[position - 1]
        closes = follows_relu and (bound == "sound-etb" or (bound == "etb" and opened))
        closes = closes and _is_block(layers[position - 1], layer, blocks)
        if closes:
            opening, (low, high) = layers[position - 1], inputs[-2]
            box_of = (low + high) / 2, Ball((high - low) / 2)
            bounds = sound_bounds if bound == "sound-etb" else expected_bounds
            low, high = bounds(layer, opening, *box_of, found[-1])[:2]
            # Sound bounds may be intersected; ETB's are what they are.
            after = (torch.maximum(after[0], low), torch.minimum(after[1], high)) if bound == "sound-etb" else (low, high)
        opened = not closes
        found.append(after)
        current = (after[0].clamp(min=0), after[1].clamp(min=0)) if rectified[position] else after
    return found


def _is_block(opening: Layer, closing: Layer, blocks: Blocks) -> bool:
    if blocks == "all":
        return True
    return isinstance(closing, Dense) and (blocks == "mixed" or isinstance(opening, Dense))


def _interval(layer: Layer, box: Interval) -> Interval:
    middle, radius = layer.apply((box[0] + box[1]) / 2), (box[1] - box[0]) / 2
    # |A| r is A+ r - A- r, one pass for each sign.
    spread = layer.sided(radius, 1) - layer.sided(radius, -1)
    return middle - spread, middle + spread


def _layer(module: nn.Linear | nn.Conv2d) -> Layer:
    if isinstance(module, nn.Linear):
        return Dense(module.weight, module.bias)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise ParameterError(f"Bounds of a convolution with padding {module.padding!r}, {module.padding_mode} are not supported.")
    stride, padding, dilation = ((int(pair[0]), int(pair[1])) for pair in (module.stride, module.padding, module.dilation))
    return Convolution(module.weight, module.bias, stride, padding, dilation, module.groups)


def _pull_back(layer: Layer, rows: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """Multiply rows (B, K, n) of a Jacobian by a layer's matrix from the right."""
    if isinstance(layer, Dense):
        return rows @ layer.weight
    images = rows.reshape(-1, *after.shape[1:])
    return layer.transposed(images, tuple(before.shape[1:])).reshape(*rows.shape[:2], -1)


class _ByAutoLirpa:
    def __init__(self, model: nn.Module, example: Tensor, bounds: Sequence[Bound]) -> None:
        from rsplugins.lirpa.network import BoundNetwork
        from rsplugins.lirpa.operators import ETB, SOUND_ETB, PluginOperators

        named = {"ibp": (), "etb": ETB, "sound-etb": SOUND_ETB}
        self.networks = {
            bound: BoundNetwork(model, example[:1].detach(), operators=PluginOperators(named[bound], estimates=bound == "etb"))
            for bound in bounds
        }

    def lower(self, images: Tensor, eps: float, specification: Tensor, bound: Bound, clip: bool) -> Tensor:
        low, _ = self.networks[bound].bounds(images, eps, clip=clip, specification=specification, upper=False)
        return low
