"""Propagation through a chain of convolutions, linear layers and ReLUs, which needs no tracer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rsplugins.chain import leaves, stray
from rsplugins.classifier import Classifier
from rsplugins.double import bring
from rsplugins.moments.activations import LeakyRelu
from rsplugins.moments.network import MomentNetwork, Propagation, check_sigma
from rsplugins.moments.operations import Elementwise, Operation, Representation
from rsplugins.moments.rules import convolved, multiplied, rearranged, scaling


def propagation(model: nn.Module, example: Tensor) -> Propagation:
    """Return the way to propagate through a model: as a chain where it is one, over auto-LiRPA's graph otherwise.

    Args:
        model: see :class:`~rsplugins.moments.MomentNetwork`; its parameters are read at each propagation.
        example: (B, ...), for its shape.

    Raises:
        PluginUnavailableError: not a chain, and auto-LiRPA is not installed.
        UsageError, ParameterError, CheckpointError: as MomentNetwork.
    """
    return MomentNetwork(model, example) if stray(model) or any(map(_unusual, leaves(model))) else MomentChain(model)


def _unusual(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1)


class MomentChain(Propagation):
    """A chain of affine layers and ReLUs, with the same rules as :class:`~rsplugins.moments.MomentNetwork`.

    Example:
        >>> from rsplugins.moments import Full
        >>> found = MomentChain(nn.Linear(3, 2)).propagate(torch.rand(5, 3), 0.25, Full())
        >>> found.covariance.shape
        torch.Size([5, 2, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def walk(self, images: Tensor, sigma: float, representation: Representation) -> str:
        """See :meth:`Propagation.walk`."""
        check_sigma(sigma)
        like = next((parameter for parameter in self._model.parameters()), images)
        images = bring(images, like.device, like.dtype)
        name = "input"
        representation.start(name, images, sigma)
        for position, operation in enumerate(self._operations(images)):
            source, name = name, str(position)
            representation.step(name, operation, (source,), ())
        return name

    def _operations(self, images: Tensor) -> Iterator[Operation]:
        yield from self._normalisation(images)
        for layer in leaves(self._model):
            if isinstance(layer, nn.Conv2d):
                assert not isinstance(layer.padding, str)  # see `propagation`
                yield convolved(layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            elif isinstance(layer, nn.Linear):
                yield multiplied(layer.weight, layer.bias)
            elif isinstance(layer, nn.ReLU):
                yield Elementwise(LeakyRelu())
            elif isinstance(layer, nn.Flatten):
                yield rearranged(layer)

    def _normalisation(self, images: Tensor) -> Iterator[Operation]:
        if not isinstance(self._model, Classifier):
            return
        shape, trailing = tuple(images.shape[1:]), (1,) * (images.dim() - 2)
        one = torch.ones((), dtype=images.dtype, device=images.device)
        if self._model.mean is not None:
            yield scaling(one, -self._model.mean.to(one).view(-1, *trailing), shape)
        if self._model.std is not None:
            yield scaling(one / self._model.std.to(one).view(-1, *trailing), 0.0, shape)
