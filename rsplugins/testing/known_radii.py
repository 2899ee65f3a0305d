"""Classifiers whose robust radius is known exactly, in every norm.

The decision boundary of each is a union of hyperplanes, so the distance of an image to it is a closed form:
min over the planes of |w.x + b| / ||w||_*, with the dual norm. Images are placed so that the nearest point of the boundary lies
inside the [0, 1] box: a certifier may use that there is no image outside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsplugins.certificate import Norm
from rsplugins.classifier import Classifier, wrap

Floats = NDArray[np.float64]

CENTRE = 0.5
FARTHEST = 0.4
"""Largest true radius of an image; the centre of the box is 0.5 from its sides."""

_DUAL: dict[Norm, float] = {Norm.L1: np.inf, Norm.L2: 2, Norm.LINF: 1}


@dataclass(frozen=True, eq=False)
class World:
    """A classifier, images, and the truth about them.

    Attributes:
        name: for reports.
        classifier: raw [0, 1] pixels to logits.
        images: (N, C, H, W).
        classes: (N,) the classifier's prediction for each image, in exact arithmetic.
        radii: (N,) the exact distance of each image to the classifier's decision boundary, in the world's norm.
        symmetric: whether the majority class under any noise that is symmetric, and independent over pixels, has the same
            boundary, so that the truth is also that of a smoothed classifier.
    """

    name: str
    classifier: Classifier
    images: Tensor
    classes: NDArray[np.int64]
    radii: Floats
    symmetric: bool = True


def distances(images: Tensor, weights: Floats, offsets: Floats, norm: Norm) -> Floats:
    """Return the signed distances (N, P) of images to hyperplanes, in a norm.

    Args:
        images: (N, ...).
        weights: (P, D).
        offsets: (P,).
        norm: of the distance.

    Example:
        >>> distances(torch.tensor([[1.0, 1.0]]), np.array([[3.0, 4.0]]), np.array([-2.0]), Norm.L2)
        array([[1.]])
    """
    values = images.flatten(1).double().numpy() @ weights.T + offsets
    signed: Floats = values / np.linalg.norm(weights, ord=_DUAL[norm], axis=1)
    return signed


def steepest(weight: Floats, norm: Norm) -> Floats:
    """Return the direction u, ||u|| = 1 in the norm, along which w.x grows fastest: w.u is the dual norm of w."""
    if norm is Norm.L2:
        return weight / np.linalg.norm(weight)
    if norm is Norm.LINF:
        return np.sign(weight)
    unit = np.zeros_like(weight)
    first = int(np.abs(weight).argmax())
    unit[first] = np.sign(weight[first])
    return unit


def half_space(
    name: str,
    shape: Sequence[int],
    norm: Norm,
    radii: Sequence[float],
    *,
    rng: np.random.Generator,
    weight: Floats | None = None,
    make: Callable[[Floats, float], Classifier] | None = None,
) -> World:
    """Return images on both sides of a hyperplane, each given distance once on each side.

    Args:
        name: for reports.
        shape: of an image.
        norm: of the distances.
        radii: the distances, at most :data:`FARTHEST`.
        rng: where the plane and the images come from.
        weight: of the plane in raw pixels; None for a random one.
        make: from weight and offset to the classifier with logits of class 1 minus class 0 = w.x + b (a positive factor apart).
    """
    size = int(np.prod(shape))
    weight = rng.standard_normal(size) if weight is None else weight
    # Weights as the float32 model will hold them: the truth is that of the model.
    weight = weight.astype(np.float32).astype(np.float64)
    offset = float(np.float32(-CENTRE * weight.sum()))
    classifier = (make or linear(shape))(weight, offset)
    up = steepest(weight, norm)
    base = np.full(size, CENTRE)
    base -= (weight @ base + offset) / (weight @ up) * up
    points = []
    for position, radius in enumerate(np.repeat(np.asarray(radii, dtype=float), 2)):
        side = 1.0 if position % 2 else -1.0
        along = rng.uniform(-0.02, 0.02, size) if position % 4 >= 2 else np.zeros(size)
        along -= (weight @ along) / (weight @ up) * up
        points.append(base + along + side * radius * up)
    images = torch.tensor(np.array(points), dtype=torch.float32).clamp(0, 1).view(-1, *shape)
    signed = distances(images, weight[None], np.array([offset]), norm)[:, 0]
    return World(name, classifier, images, (signed > 0).astype(np.int64), np.abs(signed))


def linear(shape: Sequence[int], classes: int = 2) -> Callable[[Floats, float], Classifier]:
    """Return a maker of plain linear classifiers; classes above 1 exist and never win."""

    def make(weight: Floats, offset: float) -> Classifier:
        return wrap(_network(weight, offset, classes), input_size=shape, source="a half-space")

    return make


def normalised(shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Callable[[Floats, float], Classifier]:
    """Return a maker of classifiers with normalisation inside, whose half-space is stated in raw pixels."""

    def make(weight: Floats, offset: float) -> Classifier:
        pixels = int(np.prod(shape[1:]))
        scale, shift = np.repeat(std, pixels), np.repeat(mean, pixels)
        network = _network(weight * scale, offset + float(weight @ shift), 2)
        return wrap(network, mean=mean, std=std, input_size=shape, source="a half-space behind a normalisation")

    return make


def _network(weight: Floats, offset: float, classes: int, *before: tuple[str, nn.Module]) -> nn.Module:
    layer = nn.Linear(len(weight), classes)
    with torch.no_grad():
        layer.weight.zero_()
        # Half to each class: the logits differ by w.x + b.
        layer.weight[0], layer.weight[1] = torch.tensor(-weight / 2), torch.tensor(weight / 2)
        layer.bias.fill_(-1.0)  # below the larger of s and -s: never wins
        layer.bias[0], layer.bias[1] = -offset / 2, offset / 2
    # The first layer has one name in every world, for certifiers that ask for a layer.
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *before, ("linear", layer)]))


def resized(norm: Norm, radii: Sequence[float], rng: np.random.Generator) -> World:
    """Return a half-space on images that the Classifier enlarges from 4x4 to 8x8 inside."""
    shape, inner = (1, 4, 4), (8, 8)
    pattern = torch.tensor(rng.uniform(0.2, 1.0, (1, 1, *inner)))  # of one sign, so that it survives the averaging
    raw = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    enlarged = torch.nn.functional.interpolate(raw, size=inner, mode="bilinear", align_corners=False)
    (slope,) = torch.autograd.grad((enlarged * pattern).sum(), raw)

    def make(weight: Floats, offset: float) -> Classifier:
        network = _network(pattern.numpy().reshape(-1), offset, 2)
        return wrap(network, input_size=shape, resize=inner, source="a half-space behind a resize")

    return half_space("half-space, resized inside", shape, norm, radii, rng=rng, weight=slope.numpy().reshape(-1), make=make)


def stretched(norm: Norm, radii: Sequence[float], rng: np.random.Generator) -> World:
    """Return a half-space behind a linear map that stretches its normal most, by little more than many other directions.

    The product of the layers' spectral norms is exact here, and an estimate of it from below certifies too much.
    """
    shape, size = (1, 6, 6), 36
    left, _ = np.linalg.qr(rng.standard_normal((size, size)))
    right, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = 3.0 * 0.97 ** np.arange(size)
    matrix = torch.tensor(left * values @ right.T, dtype=torch.float32)
    normal = left[:, 0]

    def make(weight: Floats, offset: float) -> Classifier:
        stretch = nn.Linear(size, size, bias=False)
        stretch.weight.data = matrix
        return wrap(_network(normal, offset, 2, ("stretch", stretch)), input_size=shape, source="a stretched half-space")

    weight = matrix.double().numpy().T @ normal
    return half_space("half-space, stretched before", shape, norm, radii, rng=rng, weight=weight, make=make)


class _Saddle(nn.Module):
    """Class 1 where (x_0 - x_1)(x_0 + x_1 - 2 * centre) > 0: a quadratic that is odd in both factors."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        value = (x[:, 0] - x[:, 1]) * (x[:, 0] + x[:, 1] - 2 * CENTRE)
        return torch.stack([-value, value], dim=1)


def saddle(norm: Norm, radii: Sequence[float], rng: np.random.Generator) -> World:
    """Return a quadratic classifier of two pixels; its boundary is two crossing lines, under any symmetric noise too."""
    planes, offsets = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([0.0, -2 * CENTRE])
    # In coordinates along and across the lines: the nearer line is at the wanted distance.
    shrink = {Norm.L1: 0.5, Norm.L2: 0.5**0.5, Norm.LINF: 1.0}[norm]
    points = []
    for radius in radii:
        other = rng.uniform(radius, max(radius, 0.24 / shrink))
        u, v = rng.permutation([radius, other]) * rng.choice([-1.0, 1.0], 2) * shrink
        points.append([CENTRE + u + v, CENTRE + v - u])
    images = torch.tensor(np.array(points), dtype=torch.float32).clamp(0, 1).view(-1, 1, 1, 2)
    signed = distances(images, planes, offsets, norm)
    classifier = wrap(_Saddle(), input_size=(1, 1, 2), source="a quadratic")
    return World("two-class quadratic", classifier, images, (signed.prod(1) > 0).astype(np.int64), np.abs(signed).min(1))


def absolute(norm: Norm, radii: Sequence[float], rng: np.random.Generator) -> World:
    """Return the ReLU network |w.x + b| - t; class 1 outside of the slab. Its truth is not that of a smoothed classifier."""
    size, shape = 16, (1, 4, 4)
    weight = rng.standard_normal(size).astype(np.float32).astype(np.float64)
    offset = float(np.float32(-CENTRE * weight.sum()))
    width = float(np.float32(0.2 * np.linalg.norm(weight, ord=_DUAL[norm])))
    both, out = nn.Linear(size, 2), nn.Linear(2, 2)
    with torch.no_grad():
        both.weight.copy_(torch.tensor(np.stack([weight, -weight])))
        both.bias.copy_(torch.tensor([offset, -offset]))
        out.weight.copy_(torch.tensor([[-0.5, -0.5], [0.5, 0.5]]))
        out.bias.copy_(torch.tensor([width / 2, -width / 2]))
    network = nn.Sequential(OrderedDict([("flatten", nn.Flatten()), ("both", both), ("relu", nn.ReLU()), ("out", out)]))
    up = steepest(weight, norm)
    base = np.full(size, CENTRE)
    signs = rng.choice([-1.0, 1.0], len(radii))
    # Inside, at most at the middle of the slab; and outside of it.
    along = np.concatenate([signs * np.maximum(0.2 - np.asarray(radii), 0), signs * (0.2 + np.minimum(radii, 0.2))])
    images = torch.tensor(base + along[:, None] * up, dtype=torch.float32).clamp(0, 1).view(-1, *shape)
    signed = distances(images, np.stack([weight, weight]), np.array([offset - width, offset + width]), norm)
    classifier = wrap(network, input_size=shape, source="|x|")
    return World("|x|", classifier, images, (signed.prod(1) > 0).astype(np.int64), np.abs(signed).min(1), symmetric=False)


class _LowBits(nn.Module):
    """Class 1 when a pixel next to 0 has bits that no float32 sum with a pixel of 3/255 can leave there."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).float()
        fine = (torch.frac(x * 2.0**30) != 0) & (x.abs() < 2.0**-8)
        found = fine.any(1).float()
        return torch.stack([1 - found, found], dim=1)


def low_bits(repeats: int) -> World:
    """Return a classifier that reads the image off the rounding of image plus noise; images of 0 and of 3/255, on the 8-bit grid.

    The idea is that of Voracek and Hein, "Sound Randomized Smoothing in Floating-Point Arithmetics" (ICLR 2023). For x = 0 the
    sum is the noise itself, and near 0 it has bits below 2^-30. For x = 3/255, in [2^-7, 2^-6), a sum near 0 is an exact
    difference of two numbers of that binade, and a multiple of 2^-30. In real arithmetic the two images differ by 3/255 a pixel,
    and a majority cannot change so fast. There is no true radius: certificates of the two images contradict each other.
    """
    shape = (3, 16, 16)
    images = torch.zeros(2 * repeats, *shape)
    images[1::2] = torch.tensor(3.0) / 255
    classifier = wrap(_LowBits(), input_size=shape, source="a reader of low bits")
    unknown = np.full(2 * repeats, np.inf)
    return World("float32 low bits", classifier, images, np.full(2 * repeats, -1), unknown, symmetric=False)
