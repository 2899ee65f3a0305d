"""``folder:PATH``: any folder of images with one sub-folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsplugins.data.dataset import Dataset, data_root, not_found
from rsplugins.data.images import class_folders, image_files, preparation, read_image
from rsplugins.errors import DataNotFoundError

_SPLIT_NAMES = {"test": ("test", "val", "validation"), "val": ("val", "validation"), "train": ("train", "training")}


def load(
    reference: str, *, root: str | Path | None = None, split: str = "test", input_size: Sequence[int] | None = None
) -> Dataset:
    """Return the images under a folder, sorted by class name and then by path.

    Args:
        reference: the folder; when it is relative and not in the working directory, it is looked for in the data root.
        root: the data root.
        split: ``PATH/test`` (or ``val``) is used where there is one, and so on; otherwise PATH itself holds the classes.
        input_size: (C, H, W): short side resized and centre cropped, as part of the data; see
            :func:`rsplugins.data.images.read_image`.

    Labels are the positions of the class names in sorted order. (For a part of ImageNet's classes use ``imagenet``, whose labels
    are ImageNet's own.)

    Raises:
        DataNotFoundError: no such folder, or no images in it.
    """
    folder = _find(reference, root, split)
    chosen = next((folder / name for name in _SPLIT_NAMES.get(split, (split,)) if (folder / name).is_dir()), folder)
    classes = class_folders(chosen)
    files = [(path, label) for label, name in enumerate(classes) for path in image_files(name)]
    if not files:
        raise DataNotFoundError(
            f"There are no images in sub-folders of {chosen}.",
            cause="the images lie directly in the folder, or in another format.",
            fix=f"Arrange them as {chosen}/CLASS/IMAGE.png, one sub-folder a class.",
        )
    return image_dataset(
        f"folder:{folder.resolve().name}", split if chosen != folder else "all", files, [c.name for c in classes], input_size
    )


def image_dataset(
    name: str,
    split: str,
    files: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    input_size: Sequence[int] | None,
    crop: float = 1.0,
) -> Dataset:
    """Return a Dataset over image files with labels, prepared at ``input_size`` where it is given."""
    # One block of bytes: a million paths as objects would be copied, a page at a time, into every process that reads them.
    paths = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    return Dataset(
        name=name,
        split=split,
        labels=[label for _, label in files],
        read=partial(_read, paths, input_size, crop),
        original=partial(_read, paths, input_size, None),
        classes=classes,
        input_size=input_size,
        preparation=preparation(input_size, crop),
    )


def _read(paths: Any, input_size: Sequence[int] | None, crop: float | None, index: int) -> Tensor:
    return read_image(Path(os.fsdecode(paths[index])), input_size, crop)


def _find(reference: str, root: str | Path | None, split: str) -> Path:
    given = Path(reference).expanduser()
    places = [given] if given.is_absolute() else [given, data_root(root) / given]
    for place in places:
        if place.is_dir():
            return place
    archive = next((place for place in places if place.is_file()), None)
    how = f"{archive} is a file: unpack it first (tar -xf)." if archive else "Check the path."
    raise not_found(f"folder:{reference}", split, "a folder", places, how)
