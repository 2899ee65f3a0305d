"""A Dataset: images as raw [0, 1] tensors and labels, at indices that never change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsplugins.data import conversion
from rsplugins.errors import DataNotFoundError, ParameterError, UnreadableInputError

_SAMPLE = 16
"""Images whose pixels enter the fingerprint, besides all labels."""


class Dataset:
    """Labelled images at stable indices, raw [0, 1] pixels, no normalisation.

    Attributes:
        options: what it was loaded with besides its name, place and split, as plain values.

    Args:
        name: the reference it was loaded by, without the place: ``"cifar10"``, ``"folder:pets"``.
        split: ``"train"``, ``"test"``, ``"val"``: as the data set calls it.
        labels: all labels in index order, 0 to ``num_classes`` - 1.
        read: index -> image, (C, H, W) or (C, T, H, W), float32 in [0, 1].
        num_classes: how many classes there are; by default one more than the largest label.
        classes: their names, or None.
        input_size: shape of every image, or None when the sizes differ.
        original: index -> the image before it was brought to ``input_size``, (C, h, w) or (C, T, h, w), for random windows in
            training; by default what ``read`` gives.
        preparation: what was done to the stored image before it counts as raw, in words; empty when nothing was.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str,
        labels: Sequence[int] | np.ndarray,
        read: Callable[[int], Tensor],
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        original: Callable[[int], Tensor] | None = None,
        preparation: str = "",
    ) -> None:
        self.name, self.split, self.preparation = name, split, preparation
        self.labels = np.asarray(labels, dtype=np.int64)
        self._read, self.original = read, original or read
        self.classes = None if classes is None else tuple(classes)
        self.options: dict[str, Any] = {}
        # Without names or a number, the labels say only how many classes there are at least.
        self._counted = num_classes is None and classes is None
        named = len(self.classes) if self.classes is not None else int(self.labels.max(initial=-1)) + 1
        self.num_classes = named if num_classes is None else num_classes
        self.input_size = None if input_size is None else tuple(int(side) for side in input_size)
        self._pixels = ""

    @classmethod
    def from_arrays(
        cls,
        images: Any,
        labels: Any,
        *,
        name: str = "arrays",
        split: str = "test",
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> Dataset:
        """Return a data set of images that are in memory.

        Args:
            images: a tensor or numpy array (N, C, H, W), or (N, C, T, H, W) for videos, or a list of tensors of one shape:
                floats in [0, 1], or 8-bit pixels, which are divided by 255. Not copied where that is not needed.
            labels: the class of each image, whole numbers from 0.
            name: what runs call the data.
            split: what runs call the split.
            num_classes: how many classes there are; by default one more than the largest label.
            classes: their names.

        Raises:
            InputValueError: images that are no raw images; with the likely cause.
            ParameterError: labels that are no classes, or another number of them.

        Example:
            >>> data = Dataset.from_arrays(np.zeros((3, 1, 8, 8)), [0, 1, 1])
            >>> len(data), data.num_classes, data.input_size
            (3, 2, (1, 8, 8))
        """
        pixels, preparation = conversion.raw_images(images)
        known = len(classes) if num_classes is None and classes is not None else num_classes
        made = cls(
            name=name,
            split=split,
            labels=conversion.class_labels(labels, len(pixels), known),
            read=pixels.__getitem__,
            num_classes=num_classes,
            classes=classes,
            input_size=pixels.shape[1:],
            preparation=preparation,
        )
        # All pixels lie in memory, so that all of them, not a sample, tell these data from others.
        made._pixels = conversion.pixels_sha256(pixels)
        return made

    @classmethod
    def from_torch(
        cls,
        dataset: Any,
        *,
        name: str = "",
        split: str = "test",
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> Dataset:
        """Return a data set that reads from a torch one, such as torchvision's.

        Args:
            dataset: indexed, of (image, label): the image a tensor in [0, 1], 8-bit pixels, or a Pillow picture; without
                normalisation and without random transforms.
            name: what runs call the data; the class's name by default.
            split: what runs call the split.
            num_classes: how many classes there are; by default from ``dataset.classes``, else from the labels.
            classes: their names; by default ``dataset.classes``.

        Raises:
            ParameterError: a stream, a DataLoader, a random transform, or items that are no pairs; with the fix.
            InputValueError: the first image is no raw image, such as a normalised one.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> data = Dataset.from_torch(TensorDataset(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])))
            >>> len(data), data.num_classes, data[3][1]
            (4, 3, 0)
        """
        conversion.map_style(dataset)
        count = len(dataset)
        if count == 0:
            raise ParameterError("The data set has no items.", fix="Pass one with at least one image.")
        conversion.check_same_twice(dataset)
        labels = conversion.class_labels(conversion.torch_labels(dataset, count), count, num_classes)
        found = getattr(dataset, "classes", None) if classes is None and num_classes is None else classes
        named = found if found is not None and len(found) > int(labels.max()) else None
        read = conversion.torch_reader(dataset, labels)
        shapes = {tuple(read(index).shape) for index in {0, count // 2, count - 1}}
        return cls(
            name=name or type(dataset).__name__,
            split=split,
            labels=labels,
            read=read,
            num_classes=num_classes,
            classes=None if named is None else [str(each) for each in named],
            input_size=shapes.pop() if len(shapes) == 1 else None,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image and label at ``index``.

        Raises:
            IndexError: outside 0 .. len - 1; negative indices too, because an index names an input for ever.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} ({self.split}) has inputs 0 to {len(self) - 1}; there is no {index}")
        return self._read(int(index)), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_size)) if self.input_size else "any size"
        return f"Dataset({self.name}, {self.split}: {len(self)} images {size}, {self.num_classes} classes)"

    def select(self, start: int = 0, stop: int | None = None, stride: int = 1) -> list[int]:
        """Return the indices start, start + stride, ... below stop, as the field's scripts choose their images.

        Args:
            start: first index.
            stop: first index that is left out; the end by default.
            stride: 20 takes every 20th image.

        Raises:
            ParameterError: outside the data set, or nothing left.

        Example:
            >>> data = Dataset(name="zeros", split="test", labels=[0] * 50, read=lambda index: torch.zeros(1, 2, 2))
            >>> data.select(stride=20)
            [0, 20, 40]
        """
        end = len(self) if stop is None else stop
        for name, value, low, high in (
            ("stride", stride, 1, max(len(self), 1)),
            ("start", start, 0, len(self) - 1),
            ("stop", end, start + 1, len(self)),
        ):
            if not low <= value <= high:
                raise ParameterError(
                    f"{name} is {value}; {self.name} ({self.split}) has {len(self)} inputs.",
                    fix=f"Use {name} from {low} to {high}." if low <= high else "Use another split or data set.",
                )
        return list(range(start, end, stride))

    def check_classes(self, outputs: int | None) -> None:
        """Refuse a model whose outputs are not the classes of this data set; None is a number that nobody knows yet.

        Raises:
            ParameterError: another number of classes; names the likely cause.
        """
        if outputs is None or outputs == self.num_classes or (self._counted and outputs > self.num_classes):
            return
        there = set(self.labels.tolist())
        empty = [name for label, name in enumerate(self.classes or ()) if label not in there]
        cause = f"{len(empty)} classes without an image, such as {empty[0]!r}, or a" if empty else "a"
        raise ParameterError(
            f"The model has {outputs} classes, and {self.name} ({self.split}) has {self.num_classes}.",
            cause=f"{cause} model for other data; labels and outputs would not mean the same.",
            fix="Use the model's own data; for a folder that holds a part of its classes, or others besides, list all of the "
            "model's in order: --data-option classes=FILE (classes=[...] in Python).",
        )

    def fingerprint(self) -> str:
        """Return a sha256 over name, split, all labels, the preparation, and the pixels of up to 16 evenly spaced images.

        Images in memory enter with all their pixels.
        """
        digest = hashlib.sha256(f"{self.name}\n{self.split}\n{len(self)}\n{self.num_classes}\n{self.preparation}\n".encode())
        digest.update(self.labels.astype("<i8").tobytes() + self._pixels.encode())
        for index in np.linspace(0, len(self) - 1, min(_SAMPLE, len(self)), dtype=int):
            try:
                image, _ = self[int(index)]
            except UnreadableInputError:
                digest.update(b"unreadable")
                continue
            digest.update(f"{tuple(image.shape)}".encode())
            digest.update(image.contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a manifest records about the data, as plain JSON values."""
        return {
            "name": self.name,
            "split": self.split,
            "length": len(self),
            "num_classes": self.num_classes,
            "input_size": None if self.input_size is None else list(self.input_size),
            "preparation": self.preparation,
            "sha256": self.fingerprint(),
            **({"options": self.options} if self.options else {}),
        }


def data_root(root: str | Path | None) -> Path:
    """Return where data sets are looked for: the argument, else ``RSPLUGINS_DATA``, else ``./data``."""
    return Path(root or os.environ.get("RSPLUGINS_DATA") or "data").expanduser()


def check_split(name: str, split: str, known: Sequence[str]) -> None:
    """Raise a ParameterError when a data set has no such split."""
    if split not in known:
        raise ParameterError(f"{name} has no split {split!r}.", fix=f"Use one of: {', '.join(known)}.")


def not_found(name: str, split: str, looked_for: str, where: Sequence[Path], how: str) -> DataNotFoundError:
    """Return the error for a data set that is not there: what was looked for, where, how to get it."""
    places = ", ".join(str(path) for path in where)
    return DataNotFoundError(
        f"{name} ({split}) was not found: looked for {looked_for} in {places}.",
        cause="the data are somewhere else, or not on this machine; nothing is downloaded without being asked.",
        fix=f"Point at them with --data-root DIR (root=... in Python) or RSPLUGINS_DATA=DIR. {how}",
    )


def image_tensor(pixels: Any) -> Tensor:
    """Return uint8 pixels, (H, W) or (H, W, C), as float32 (C, H, W) in [0, 1]."""
    array = np.asarray(pixels)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) / 255
