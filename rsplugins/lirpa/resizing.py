"""A Classifier's resizing as a linear layer, for auto-LiRPA, which has no bounds for interpolation."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from rsplugins.classifier import resized
from rsplugins.errors import ParameterError

LARGEST = 2**26
"""Most entries of the matrix; in float64 that is half a gigabyte."""


def resize_layers(shape: tuple[int, ...], size: tuple[int, int]) -> nn.Sequential:
    """Return the bilinear resizing of images as flatten, matrix, unflatten: the same function, in float64.

    Args:
        shape: of one image, (C, H, W) or (C, T, H, W).
        size: (H, W) to resize to.

    Raises:
        ParameterError: the matrix would be too large.

    Example:
        >>> layers = resize_layers((1, 1, 2), (1, 3))
        >>> [round(value, 4) for value in layers(torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)).flatten().tolist()]
        [0.0, 0.5, 1.0]
    """
    target = (*shape[:-2], *size)
    pixels, entries = math.prod(shape), math.prod(shape) * math.prod(target)
    if entries > LARGEST:
        raise ParameterError(
            f"The Classifier resizes images of {_by(shape)} to {_by(target)} inside; as a matrix that is {entries:.2g} "
            f"numbers, and at most {LARGEST:.2g} are bounded.",
            cause="auto-LiRPA has no bounds for interpolation, so the resizing is given to it as a linear layer.",
            fix=f"Bound the network on images of {_by(target)} (wrap it without resize; the radius is then one of those images), "
            "or use a method that samples, such as gaussian.",
        )
    images = torch.eye(pixels, dtype=torch.float64).view(pixels, *shape)
    matrix = nn.Linear(pixels, math.prod(target), bias=False, dtype=torch.float64)
    matrix.weight = nn.Parameter(resized(images, size).flatten(1).T.contiguous(), requires_grad=False)
    layers = [("flatten", nn.Flatten()), ("resize", matrix), ("unflatten", View(target))]
    return nn.Sequential(OrderedDict(layers)).eval()


class View(nn.Module):
    """Vectors (B, N) as images; nn.Unflatten is traced to an operator without bounds. Patches do not pass it: use matrices."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *shape)."""
        return x.reshape(-1, *self.shape)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
