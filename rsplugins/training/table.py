"""Images resident on the device, and augmentation there: for small images a loader would be slower than the network."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rsplugins.errors import InputValueError


class LabelledImages(Protocol):
    """What a data set must have: a length, and (image, label) by index; images float (C, H, W), raw [0, 1] pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


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
        if len(self.images) == 0:
            raise InputValueError("The split is empty.", cause="A wrong split, or a folder without images.", fix="Check [data].")
        if len(self.images) != len(self.labels):
            raise InputValueError(
                f"There are {len(self.images)} images and {len(self.labels)} labels.", fix="Check the data set."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            bad = int(((self.labels < 0) | (self.labels >= self.num_classes)).nonzero()[0])
            allowed = f"the {self.num_classes} classes 0 to {self.num_classes - 1}"
            raise InputValueError(
                f"Label {int(self.labels[bad])} of input {bad} lies outside {allowed}.",
                cause="Labels counted from 1, or num_classes of another data set.",
                fix="Number the classes from 0, or correct num_classes.",
            )
        if self.images.is_floating_point() and not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise InputValueError(
                "The images have values outside [0, 1].",
                cause="Pixels in 0 to 255, or already normalised.",
                fix="Give raw [0, 1] pixels; normalisation belongs to the model: [model] mean, std.",
            )

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


def as_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]; float images as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def load_table(name: str, split: str, root: str | Path | None = None, input_size: Sequence[int] | None = None) -> ImageTable:
    """Load a split of a data set into one tensor.

    Raises:
        DataNotFoundError: what was looked for, where, and how to get it.
        InputValueError: an empty split, labels outside the classes, images of several sizes.
    """
    from rsplugins.data import load

    dataset = load(name, root=root, split=split, input_size=input_size)
    return table_of(dataset, num_classes=dataset.num_classes)


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
        items = list(pool.map(lambda index: _compact(dataset[index]), range(len(dataset))))
    if not items:
        raise InputValueError("The split is empty.", cause="A wrong split, or a folder without images.", fix="Check [data].")
    sizes = {tuple(image.shape) for image, _ in items}
    if len(sizes) > 1:
        raise InputValueError(
            f"The images have several sizes: {', '.join('x'.join(map(str, size)) for size in sorted(sizes)[:3])}, ...",
            cause="A data set of photographs.",
            fix="Training keeps all images in memory at one size: say [data] input_size = [3, 224, 224].",
        )
    dtype = torch.uint8 if all(image.dtype == torch.uint8 for image, _ in items) else torch.float32
    images = torch.stack([image if dtype == torch.uint8 else as_float(image) for image, _ in items])
    return ImageTable(images, torch.tensor([label for _, label in items], dtype=torch.long), num_classes)


def _compact(item: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """Store an image as uint8 where that loses nothing."""
    image, label = item
    levels = (image * 255).round().clamp_(0, 255).to(torch.uint8)
    return (levels if torch.equal(as_float(levels), image.float()) else image.float()), int(label)


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
