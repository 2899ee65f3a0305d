"""Small networks by name, for checkpoints of the zoo and of users: ``file:weights.safetensors`` with ``architecture="resnet18"``.

All take normalised images, or videos, and return logits; weights are random until a checkpoint is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.errors import ParameterError, UnknownNameError
from rsplugins.lipschitz.orthogonal import orthogonal_network

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier


def digits_cnn(num_classes: int = 10, width: int = 32) -> nn.Module:
    """Two convolutions and two linear layers for (1, 8, 8) images; made to be fast on a CPU."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * width, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def mnist_cnn(num_classes: int = 10, width: int = 16) -> nn.Module:
    """Four convolutions and two linear layers for (1, 28, 28) images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 49, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def mnist_small(num_classes: int = 10, width: int = 16) -> nn.Module:
    """Two convolutions and two linear layers for (1, 28, 28) images: the small network of Gowal et al. (2019) and of ETB."""
    return _small(num_classes, width, channels=1, side=10)


def cifar_small(num_classes: int = 10, width: int = 16) -> nn.Module:
    """:func:`mnist_small` for (3, 32, 32) images."""
    return _small(num_classes, width, channels=3, side=12)


def _small(num_classes: int, width: int, *, channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def cifar_medium(num_classes: int = 10, width: int = 32) -> nn.Module:
    """Four convolutions and three linear layers for (3, 32, 32) images: the medium network of Gowal et al. (2019) and of ETB.

    A chain without batch normalisation, as training with bounds and with propagated covariances wants it.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 25, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        layers: list[nn.Module] = []
        for stage, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                layers.append(_BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(y.mean((2, 3)))
        return logits


def resnet18(num_classes: int = 10, channels: int = 3, width: int = 64) -> nn.Module:
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling (He et al. 2016, as used on CIFAR)."""
    return _ResNet((2, 2, 2, 2), (width, 2 * width, 4 * width, 8 * width), num_classes, channels)


def resnet20(num_classes: int = 10, channels: int = 3, width: int = 16) -> nn.Module:
    """ResNet-20 for 32x32 images (He et al. 2016, section 4.2) with projection shortcuts: 0.27 M weights."""
    return _ResNet((3, 3, 3), (width, 2 * width, 4 * width), num_classes, channels)


def fast_cifar(num_classes: int = 10, channels: int = 3, width: int = 64, depth: int = 2) -> nn.Module:
    """A chain for 32x32 images that pools early, in the manner of Jordan's airbench (2024): much accuracy for its time.

    Half a dozen 3x3 convolutions, most of them on 15x15 pixels or fewer; ReLU in place of GELU, so that bounds and moments apply.

    Args:
        num_classes: K.
        channels: of the images.
        width: channels of the first of three groups; the other two have four times as many. 64 is airbench94's size.
        depth: convolutions a group; airbench96 has 3.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, 24, 2), nn.ReLU()]
    inputs = 24
    for outputs in (width, 4 * width, 4 * width):
        for position in range(depth):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            if position == 0:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(inputs, num_classes))


def video_cnn(num_classes: int = 8, channels: int = 1, width: int = 12) -> nn.Module:
    """Three strided 3D convolutions and a mean over all that is left, for videos (C, T, H, W) such as (1, 32, 16, 16).

    Made to be fast on a CPU; the mean makes it blind to where in the frame something moves.
    """
    return nn.Sequential(
        nn.Conv3d(channels, width, (5, 4, 4), stride=2, padding=(2, 1, 1), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.Conv3d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm3d(2 * width),
        nn.ReLU(),
        nn.Conv3d(2 * width, 4 * width, 3, stride=(2, 1, 1), padding=1, bias=False),
        nn.BatchNorm3d(4 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def latent_mnist(num_classes: int = 10, width: int = 32, orthogonal: bool = False) -> nn.Module:
    """Encoder and head for (1, 28, 28) images, children ``encoder`` and ``head``, to be smoothed between the two.

    Args:
        num_classes: K.
        width: channels of the head.
        orthogonal: whether the encoder is orthogonal by construction, as it is trained: needs orthogonium. The checkpoint that
            training writes holds plain weights, for the network without.
    """
    return orthogonal_network("mnist", num_classes=num_classes, width=width, parametrised=orthogonal)


def latent_cifar10(num_classes: int = 10, width: int = 128, small: bool = False, orthogonal: bool = False) -> nn.Module:
    """Encoder and head for (3, 32, 32) images, as :func:`latent_mnist`.

    Args:
        num_classes: K.
        width: channels of the head.
        small: an encoder with a stride from the first layer, which a CPU trains.
        orthogonal: see :func:`latent_mnist`.
    """
    size: Literal["cifar10-small", "cifar10"] = "cifar10-small" if small else "cifar10"
    return orthogonal_network(size, num_classes=num_classes, width=width, parametrised=orthogonal)


def denoised(num_classes: int, classifier: Classifier, sigma: float = 0.25, **arguments: Any) -> nn.Module:
    """A denoiser in front of another model, which stays as it is: what a recipe of a denoiser trains.

    Args:
        num_classes: of the classifier.
        classifier: a model; recipes and manifests name it, ``"zoo:ID"``.
        sigma: the noise level that the denoiser is told where the whole is called.
        arguments: of :class:`rsplugins.denoising.network.UNetDenoiser`.

    Raises:
        ParameterError: the classifier has another number of classes than the data.
    """
    from rsplugins.denoising.composition import Denoised
    from rsplugins.denoising.network import UNetDenoiser

    if classifier.num_classes not in (None, num_classes):
        raise ParameterError(
            f"The classifier behind the denoiser has {classifier.num_classes} classes, and the data {num_classes}.",
            fix="Name the classifier of these data, or data with a folder for each of its classes.",
        )
    return Denoised(UNetDenoiser(**arguments), classifier, sigma, frozen=True)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cifar_medium": cifar_medium,
    "cifar_small": cifar_small,
    "denoised": denoised,
    "digits_cnn": digits_cnn,
    "fast_cifar": fast_cifar,
    "latent_cifar10": latent_cifar10,
    "latent_mnist": latent_mnist,
    "mnist_cnn": mnist_cnn,
    "mnist_small": mnist_small,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "video_cnn": video_cnn,
}
"""Every network of this module, by the name that manifests and ``architecture=`` use."""


def resolve(name: str) -> Callable[..., nn.Module]:
    """Return a constructor: a name of this module, ``"timm:NAME"`` (random weights), or ``"module:attribute"``.

    Raises:
        UnknownNameError: no such name here; with a did-you-mean.
        ParameterError: the module or its attribute does not exist.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if ":" not in name:
        fix = f'Use one of: {", ".join(sorted(ARCHITECTURES))}; or "module:attribute" for a constructor of your own.'
        raise UnknownNameError("architecture", name, ARCHITECTURES, fix=fix)
    module, _, attribute = name.partition(":")
    if module == "timm":
        import timm

        if not timm.is_model(attribute):
            raise UnknownNameError("timm model", attribute, timm.list_models(), fix="timm.list_models() lists them.")
        return partial(timm.create_model, attribute, pretrained=False)
    try:
        found: Callable[..., nn.Module] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParameterError(
            f"The architecture {name!r} cannot be imported: {error}.",
            cause="the module is not on the path of this Python.",
            fix='Write it as "package.module:constructor", and install the package or set PYTHONPATH.',
        ) from error
    return found


def build(name: str, **arguments: Any) -> nn.Module:
    """Build a network by the name that :func:`resolve` takes.

    Example:
        >>> sum(p.numel() for p in build("digits_cnn").parameters())
        35914
    """
    return resolve(name)(**arguments)
