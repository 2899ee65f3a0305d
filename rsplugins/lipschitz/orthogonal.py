"""Encoders of orthogonal layers, whose Lipschitz bound is close to 1, with heads to train behind them.

The layers are orthogonium's (Boissin et al., "An Adaptive Orthogonal Convolution Scheme", arXiv 2501.07930). Their bound is
computed from the weights like any other network's: the parametrisation is iterative, so the weights are orthogonal up to 1e-4 or
so, and they change a little at every reading, in eval mode too. So train with :func:`orthogonal_network`, then fix the weights
with :func:`plain`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rsplugins.errors import ParameterError, PluginUnavailableError

M = TypeVar("M", bound=nn.Module)
Size = Literal["mnist", "cifar10", "cifar10-small", "imagenet"]

_SIZES: dict[str, tuple[tuple[int, int, int], int, tuple[tuple[int, int, int], ...]]] = {
    # name: (image, classes, (channels, kernel, stride) by convolution of the encoder)
    "mnist": ((1, 28, 28), 10, ((16, 4, 2), (64, 4, 2))),
    "cifar10": ((3, 32, 32), 10, ((32, 3, 1), (64, 4, 2), (64, 3, 1))),
    "cifar10-small": ((3, 32, 32), 10, ((16, 4, 2), (64, 4, 2))),
    "imagenet": ((3, 224, 224), 1000, ((64, 8, 4), (128, 4, 2), (128, 3, 1))),
}


class MaxMin(nn.Module):
    """Order each pair of channels: for (B, 2C, ...) the maxima of the two halves, then their minima; same shape.

    Continuous, and a permutation on each of finitely many pieces: it keeps norms of gradients, and its Lipschitz constant is 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima, then the minima."""
        a, b = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


def orthogonal_network(
    size: Size, *, num_classes: int | None = None, width: int = 128, parametrised: bool = True
) -> nn.Sequential:
    """Return an untrained network with an orthogonal encoder and an ordinary head, to be trained with noise between the two.

    Args:
        size: the images: ``"mnist"`` (1, 28, 28), ``"cifar10"`` (3, 32, 32), ``"cifar10-small"`` (the same images, with an
            encoder that a CPU trains in minutes: its first layer has a stride) or ``"imagenet"`` (3, 224, 224).
        num_classes: of the head; the data set's own number when left out.
        width: channels of the head.
        parametrised: whether the encoder's weights are orthogonal by construction, as training needs it. False gives the same
            network of plain layers, for the weights that :func:`plain` made; it does not need orthogonium.

    Returns:
        A module with children ``encoder`` and ``head``: train it, fix it with :func:`plain`, wrap it and certify with ``latent``
        at ``split="encoder"``. The encoder is made of circular orthogonal convolutions and MaxMin, which keep distances; the head
        of convolutions with batch normalisation. No normalisation comes first: its 1/std would multiply the bound.

    Raises:
        ParameterError: another size.
        PluginUnavailableError: orthogonium is not installed, and ``parametrised``.
    """
    if size not in _SIZES:
        raise ParameterError(f"There is no orthogonal network of size {size!r}.", fix=f"Use one of {', '.join(_SIZES)}.")
    convolution = _orthogonal_convolution() if parametrised else nn.Conv2d
    (channels, _, _), classes, plan = _SIZES[size]
    layers: list[nn.Module] = []
    for out, kernel, stride in plan:
        padding = (kernel - stride) // 2 if stride > 1 else kernel // 2
        layers += [convolution(channels, out, kernel, stride=stride, padding=padding, padding_mode="circular"), MaxMin()]
        channels = out
    head = nn.Sequential(
        *_block(channels, width, stride=1),
        *_block(width, width, stride=2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(width * 16, num_classes or classes),
    )
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(*layers), head=head))


def plain(network: M) -> M:
    """Return a copy in eval mode whose convolutions and linear layers hold their weights as plain numbers.

    Computing orthogonal weights from their parameters at each forward pass is for training; the copy is faster, keeps its weights
    whatever is done to it, and its checkpoint loads without orthogonium's parametrisation.
    """
    frozen = copy.deepcopy(network).eval()
    for parent in list(frozen.modules()):
        for name, child in list(parent.named_children()):
            layer = _plain_layer(child)
            if layer is not None:
                setattr(parent, name, layer)
    return frozen


def _plain_layer(layer: nn.Module) -> nn.Module | None:
    if type(layer) in (nn.Conv2d, nn.Linear) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return None
    bias = layer.bias is not None
    made: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        made = nn.Linear(layer.in_features, layer.out_features, bias)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
        made = nn.Conv2d(layer.in_channels, layer.out_channels, bias=bias, **settings)
    with torch.no_grad():
        made.weight = nn.Parameter(layer.weight.detach().clone())
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.eval()


def _block(channels: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _orthogonal_convolution() -> Callable[..., nn.Module]:
    try:
        from orthogonium.layers import AdaptiveOrthoConv2d
    except ImportError as error:
        raise PluginUnavailableError(
            "Orthogonal encoders are built from orthogonium's layers, and orthogonium is not installed.",
            fix="pip install 'rsplugins[orthogonal]'",
        ) from error
    found: Callable[..., nn.Module] = AdaptiveOrthoConv2d
    return found
