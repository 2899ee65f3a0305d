"""Images resident on the device, and augmentation there: for small images a loader would be slower than the network.

What does not fit into memory is read as it is needed: :mod:`rsplugins.data.streamed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rsplugins.errors import InputValueError


class LabelledImages(Protocol):
    """What a data set must have: a length, and (image, label) by index; images float (C, H, W), raw [0, 1] pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class Table(Protocol):
    """Labelled images of one size, by index: what trainer, attacks and certification ask of a split."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """All labels, (N,) int64, on the device where the images arrive."""
        ...

    @property
    def num_classes(self) -> int:
        """K."""
        ...

    @property
    def input_size(self) -> tuple[int, ...]:
        """Shape of one image."""
        ...

    def to(self, device: torch.device) -> Table:
        """Return the table on a device."""
        ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), float32 in [0, 1], and labels (B,) at the indices (B,)."""
        ...

    def batches(self, indices: Iterable[Tensor], seed: int | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 or float32, and labels for each of the index vectors.

        Args:
            indices: (B,) each.
            seed: of the random windows of training, where the table takes any; None for the images as they are evaluated.
        """
        ...


@dataclass(frozen=True)
class ImageTable:
    """All images of a split in one tensor.

    Attributes:
        images: (N, C, H, W); uint8 where the pixels are whole grey levels of 255, else float32 in [0, 1].
        labels: (N,) int64.
        num_classes: K.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise InputValueError(
                f"There are {len(self.images)} images and {len(self.labels)} labels.", fix="Check the data set."
            )
        check_labels(self.labels, self.num_classes)
        check_pixels(self.images)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Shape of one image, (C, H, W)."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device) -> ImageTable:
        """Return the table on a device."""
        return ImageTable(self.images.to(device), self.labels.to(device), self.num_classes)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), float32 in [0, 1], and labels (B,) at the indices (B,)."""
        return as_float(self.images[index]), self.labels[index]

    def batches(self, indices: Iterable[Tensor], seed: int | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 or float32, and labels for each of the index vectors; there are no random windows."""
        for index in indices:
            yield self.images[index], self.labels[index]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse an empty split, and labels (N,) outside the classes."""
    if len(labels) == 0:
        raise InputValueError("The split is empty.", cause="A wrong split, or a folder without images.", fix="Check [data].")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        bad = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        raise InputValueError(
            f"Label {int(labels[bad])} of input {bad} lies outside the {num_classes} classes 0 to {num_classes - 1}.",
            cause="Labels counted from 1, or num_classes of another data set.",
            fix="Number the classes from 0, or correct num_classes.",
        )


def check_pixels(images: Tensor) -> None:
    """Refuse float images with values outside [0, 1]."""
    if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
        raise InputValueError(
            "The images have values outside [0, 1].",
            cause="Pixels in 0 to 255, or already normalised.",
            fix="Give raw [0, 1] pixels; normalisation belongs to the model: [model] mean, std.",
        )


def as_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]; float images as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def table_of(dataset: LabelledImages, num_classes: int, threads: int = 8) -> ImageTable:
    """Read a whole data set into one tensor.

    Args:
        dataset: see :class:`LabelledImages`.
        num_classes: K.
        threads: readers; decoding images releases the interpreter lock.

    Raises:
        InputValueError: an empty split, labels outside the classes, images of several sizes.
    """
    with ThreadPoolExecutor(threads) as pool:
        items = list(pool.map(lambda index: _compact_item(dataset[index]), range(len(dataset))))
    labels = torch.tensor([label for _, label in items], dtype=torch.long)
    check_labels(labels, num_classes)
    return ImageTable(stack([image for image, _ in items]), labels, num_classes)


def stack(images: Sequence[Tensor]) -> Tensor:
    """Return compact images in one tensor: uint8 if all of them are, else float32.

    Raises:
        InputValueError: images of several sizes.
    """
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise InputValueError(
            f"The images have several sizes: {', '.join('x'.join(map(str, size)) for size in sorted(sizes)[:3])}, ...",
            cause="A data set of photographs.",
            fix="Training takes images of one size: say [data] input_size = [3, 224, 224].",
        )
    levels = all(image.dtype == torch.uint8 for image in images)
    return torch.stack([image if levels else as_float(image) for image in images])


def compact(image: Tensor) -> Tensor:
    """Return an image as uint8 where that loses nothing, else as float32."""
    levels = (image * 255).round().clamp_(0, 255).to(torch.uint8)
    return levels if torch.equal(as_float(levels), image.float()) else image.float()


def _compact_item(item: tuple[Tensor, int]) -> tuple[Tensor, int]:
    image, label = item
    return compact(image), int(label)


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed that is a function of the parts alone.

    All randomness of a training step comes from (seed, epoch, step, rank), so a resumed run needs no generator state and equals
    an uninterrupted one.
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def augment(images: Tensor, *, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift images by up to ``crop`` pixels in each direction over zeros, and mirror half of them, in one gather.

    Args:
        images: (B, C, H, W), or (B, C, T, H, W) for video; any dtype.
        crop: pixels of padding; 0 for no shift.
        flip: whether to mirror.
        generator: on the device of the images.

    Returns:
        Same shape and dtype.
    """
    if not crop and not flip:
        return images
    shape, (height, width) = images.shape, images.shape[-2:]
    # The frames of a video move together, as the channels of an image do.
    images = images.reshape(shape[0], -1, height, width)
    count, channels = images.shape[:2]
    device = images.device
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        mirrored = torch.rand((count, 1), device=device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if crop:
        shift = torch.randint(0, 2 * crop + 1, (2, count, 1), device=device, generator=generator)
        rows, columns = rows + shift[0], columns + shift[1]
        images = torch.nn.functional.pad(images, (crop, crop, crop, crop))
    batch = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return images[batch, channel, rows[:, None, :, None], columns[:, None, None, :]].reshape(shape)
