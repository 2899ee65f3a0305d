"""The data sets that torchvision knows, read where they are; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from rsplugins.data.cifar import read_batches
from rsplugins.data.dataset import Dataset, check_split, data_root, image_tensor, not_found
from rsplugins.data.folder import image_dataset
from rsplugins.data.images import class_folders, image_files, stored_sizes
from rsplugins.data.preparation import Preparation, plan
from rsplugins.errors import ParameterError, UnknownNameError

Plan = Callable[[Sequence[tuple[Path, int]]], Preparation | None]
"""From the files of a data set to how they are prepared."""


@dataclass(frozen=True)
class _Source:
    """How one data set is found and read."""

    files: Callable[[str], list[str]]
    """split -> what has to be in the data set's folder, relative."""
    read: Callable[[str, Path, str, Sequence[int] | None], Dataset] | None
    how: str
    splits: tuple[str, ...] = ("train", "test")
    photographs: Callable[[str, Path, str, Plan, str | None], Dataset] | None = None
    """In place of ``read``, for files of any size."""


def load(
    reference: str,
    *,
    root: str | Path | None = None,
    split: str = "test",
    input_size: Sequence[int] | None = None,
    preparation: Mapping[str, Any] | None = None,
    resize: int | Sequence[int] | None = None,
    crop: float | Sequence[int] | None = None,
    interpolation: str | None = None,
    crop_mode: str | None = None,
    alpha: str | None = None,
) -> Dataset:
    """Return a data set that torchvision knows.

    Args:
        reference: ``mnist``, ``fashion-mnist``, ``svhn``, ``cifar10``, ``cifar100``, ``imagenet`` or ``places365``.
        root: the data root; the data set lies in it or in its sub-folder of that name, laid out as torchvision does it.
        split: ``test`` or ``train``; ``test`` means the labelled validation split of ImageNet and Places365.
        input_size: the model's (C, H, W). ImageNet and Places365 are prepared at it, as ``folder`` does; the others have one
            size, which must be it.
        preparation: what the model's own configuration says about it.
        resize: with those below, for ImageNet and Places365 alone: see ``rsplugins plugins show folder``.
        crop: side of the centre crop in pixels, (H, W), or a fraction of the resized side.
        interpolation: such as ``bicubic`` or ``bilinear``.
        crop_mode: ``center``, ``squash`` or ``border``.
        alpha: what to do with transparent pixels: ``drop``, ``white`` or ``black``.

    Raises:
        DataNotFoundError: what was looked for, where, and how to get it.
        ParameterError: no such split, or images of another size than the model takes.
    """
    if reference not in _SOURCES:
        raise UnknownNameError("torchvision data set", reference, _SOURCES)
    source = _SOURCES[reference]
    if split == "test" and "test" not in source.splits:
        split = "val"
    check_split(reference, split, source.splits)
    base = data_root(root)
    places = [base, base / reference]
    needed = source.files(split)
    options = {"resize": resize, "crop": crop, "interpolation": interpolation, "crop_mode": crop_mode}
    given = [name for name, value in {**options, "alpha": alpha}.items() if value is not None]
    if given and source.photographs is None:
        raise ParameterError(f"{reference} takes no {', '.join(given)}: its images have one size.", fix="Leave the options out.")
    for place in places:
        if not all((place / name).exists() for name in needed):
            continue
        if source.read is not None:
            return source.read(reference, place, split, input_size)
        if source.photographs is not None:
            return source.photographs(reference, place, split, partial(_plan, input_size, options, preparation), alpha)
    raise not_found(reference, split, " and ".join(needed), places, source.how)


def _plan(
    input_size: Sequence[int] | None,
    options: Mapping[str, Any],
    preparation: Mapping[str, Any] | None,
    files: Sequence[tuple[Path, int]],
) -> Preparation | None:
    return plan(input_size, options, preparation, stored_sizes(files))


def _arrays(
    name: str,
    split: str,
    images: np.ndarray[Any, Any],
    labels: Any,
    classes: Sequence[str],
    input_size: Sequence[int] | None,
    note: str = "",
) -> Dataset:
    """Return a Dataset over uint8 images of one size, (N, H, W) or (N, H, W, C)."""
    own = image_tensor(images[0]).shape
    if input_size is not None and tuple(input_size) != tuple(own):
        raise ParameterError(
            f"{name} has images of shape {tuple(own)}; the model takes {tuple(input_size)}.",
            cause="a model made for other data.",
            fix="Let the model resize, inside the Classifier: "
            f"wrap(..., input_size={tuple(own)}, resize={tuple(input_size)[-2:]}).",
        )
    return Dataset(
        name=name,
        split=split,
        labels=labels,
        read=lambda index: image_tensor(images[index]),
        classes=classes,
        input_size=own,
        preparation=note,
    )


def _differs(paths: Sequence[tuple[Path, str]]) -> str:
    """Say which files are not the published ones; a repacked or shortened copy can be used, but not unnoticed."""
    others = [path.name for path, md5 in paths if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5]
    return f"not the published files: {', '.join(others)}" if others else ""


class _Mnist:
    """The idx files of MNIST and FashionMNIST; only those of the split that is read have to be there."""

    def __init__(self, kind: type[datasets.MNIST]) -> None:
        # torchvision derives the folder from the class's own name
        self.kind = type(kind.__name__, (kind,), {"_check_exists": lambda _: True})

    def files(self, split: str) -> list[str]:
        prefix = "train" if split == "train" else "t10k"
        return [f"{self.kind.__name__}/raw/{prefix}-{name}-ubyte" for name in ("images-idx3", "labels-idx1")]

    def read(self, name: str, place: Path, split: str, input_size: Sequence[int] | None) -> Dataset:
        data = self.kind(place, train=split == "train")
        return _arrays(name, split, data.data.numpy(), data.targets.numpy(), data.classes, input_size)


class _Svhn(datasets.SVHN):  # type: ignore[misc]  # torchvision has no types
    """SVHN without the refusal of every file but the published one; a difference is recorded instead."""

    def _check_integrity(self) -> bool:
        return True

    @classmethod
    def files(cls, split: str) -> list[str]:
        return [str(cls.split_list[split][1])]

    @classmethod
    def read(cls, name: str, place: Path, split: str, input_size: Sequence[int] | None) -> Dataset:
        data = cls(place, split=split)
        note = _differs([(place / data.filename, data.file_md5)])
        images = data.data.transpose(0, 2, 3, 1)
        return _arrays(name, split, images, np.atleast_1d(data.labels), [str(digit) for digit in range(10)], input_size, note)


class _Cifar:
    """The Python batches of CIFAR-10 and CIFAR-100."""

    def __init__(self, kind: type[datasets.CIFAR10], key: str) -> None:
        self.kind, self.key = kind, key

    def _list(self, split: str) -> list[tuple[str, str]]:
        return [(f"{self.kind.base_folder}/{file}", md5) for file, md5 in getattr(self.kind, f"{split}_list")]

    def files(self, split: str) -> list[str]:
        return [file for file, _ in self._list(split)] + [f"{self.kind.base_folder}/{self.kind.meta['filename']}"]

    def read(self, name: str, place: Path, split: str, input_size: Sequence[int] | None) -> Dataset:
        listed = [(place / file, md5) for file, md5 in self._list(split)]
        images, labels = read_batches([path for path, _ in listed], self.key)
        classes = read_batches([place / self.files(split)[-1]], self.kind.meta["key"])[1]
        return _arrays(name, split, images, labels, classes, input_size, _differs(listed))


def _read_imagenet(name: str, place: Path, split: str, how: Plan, alpha: str | None) -> Dataset:
    """Read SPLIT/WNID/*.JPEG; labels are ImageNet's own even when some classes are missing."""
    from timm import data as timm_data

    wnids: list[str] = timm_data.ImageNetInfo().label_names()  # type: ignore[attr-defined,no-untyped-call]
    index = {wnid: label for label, wnid in enumerate(wnids)}
    folders = class_folders(place / split)
    foreign = [folder.name for folder in folders if folder.name not in index]
    if foreign or not folders:
        raise not_found(
            name, split, "one folder for each class (n01440764 ...)", [place / split], f"{_IMAGENET} Found: {foreign[:3]}."
        )
    files = [(path, index[folder.name]) for folder in folders for path in image_files(folder)]
    return image_dataset(name, split, files, wnids, how(files), alpha)


class _Places(datasets.Places365):  # type: ignore[misc]  # torchvision has no types
    """Places365 with whichever images are there, small or large; its lists need not be the published ones."""

    def _check_integrity(self, file: str, md5: str, download: bool) -> bool:
        return True

    @staticmethod
    def files(split: str) -> list[str]:
        return ["categories_places365.txt", f"places365_{'train_standard' if split == 'train' else 'val'}.txt"]

    @classmethod
    def read(cls, name: str, place: Path, split: str, how: Plan, alpha: str | None) -> Dataset:
        own = "train-standard" if split == "train" else "val"
        folder = f"data_{{}}_{'standard'}" if split == "train" else "val_{}"
        sizes = [size for size in ("256", "large") if (place / folder.format(size)).is_dir()]
        if not sizes:
            raise not_found(name, split, f"{folder.format('256')} or {folder.format('large')}", [place], _SOURCES[name].how)
        data = cls(str(place), split=own, small=sizes[0] == "256", download=False)
        files = [(Path(path), int(label)) for path, label in data.imgs]
        note = _differs([(place / file, md5) for file, md5 in (cls._CATEGORIES_META, cls._FILE_LIST_META[own])])
        dataset = image_dataset(name, split, files, data.classes, how(files), alpha)
        dataset.preparation = "; ".join(text for text in (f"{sizes[0]} images", note, dataset.preparation) if text)
        return dataset


def _download(kind: str, where: str = "train=False") -> str:
    return f'Download: python -c "from torchvision.datasets import {kind}; {kind}(DIR, {where}, download=True)".'


_IMAGENET = (
    "Get ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from image-net.org (an account is needed), put both in DIR, "
    "and let torchvision.datasets.ImageNet(DIR, split='val') unpack them to val/WNID/*.JPEG."
)
_PLACES = (
    "Download: python -c \"from torchvision.datasets import Places365; Places365(DIR, split='val', small=True, download=True)\"."
)
_MNIST, _FASHION = _Mnist(datasets.MNIST), _Mnist(datasets.FashionMNIST)
_CIFAR10, _CIFAR100 = _Cifar(datasets.CIFAR10, "labels"), _Cifar(datasets.CIFAR100, "fine_labels")
_SOURCES: dict[str, _Source] = {
    "mnist": _Source(_MNIST.files, _MNIST.read, _download("MNIST")),
    "fashion-mnist": _Source(_FASHION.files, _FASHION.read, _download("FashionMNIST")),
    "svhn": _Source(_Svhn.files, _Svhn.read, _download("SVHN", "split='test'")),
    "cifar10": _Source(_CIFAR10.files, _CIFAR10.read, _download("CIFAR10")),
    "cifar100": _Source(_CIFAR100.files, _CIFAR100.read, _download("CIFAR100")),
    "imagenet": _Source(lambda split: [split], None, _IMAGENET, ("train", "val"), _read_imagenet),
    "places365": _Source(_Places.files, None, _PLACES, ("train", "val"), _Places.read),
}
