"""Image files: finding them class by class, and reading them as they are prepared."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rsplugins.data.pixels import decode, stored_size
from rsplugins.data.preparation import Preparation

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_PICTURES = (
    ".npy",
    ".npz",
    ".heic",
    ".avif",
    ".jxl",
    ".jp2",
    ".exr",
    ".dcm",
    ".nii",
    ".mat",
    ".h5",
    ".tga",
    ".pbm",
    ".pfm",
    ".svg",
)
"""Files that may well be pictures, but are not read."""
_PEEKS = 5


def natural(name: str) -> tuple[object, ...]:
    """Return the sort key that puts ``class2`` before ``class10``; names without numbers sort as ever.

    Example:
        >>> sorted(["10", "1", "11", "2"], key=natural), sorted(["b", "a10", "a9", "C"], key=natural)
        (['1', '2', '10', '11'], ['C', 'a9', 'a10', 'b'])
    """
    # Words and numbers alternate, so that a number is never compared with a word.
    parts = re.split(r"([0-9]+)", name)
    return (*(int(part) if position % 2 else part for position, part in enumerate(parts)), name)


def class_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that are classes, links too, in natural order (1, 2, 10); hidden ones are none."""
    found = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(found, key=lambda entry: natural(entry.name))


def image_files(folder: Path) -> list[Path]:
    """Return the images under a folder, at any depth and through links, sorted by path; nothing that is hidden."""
    return sorted(path for path in _files(folder) if path.suffix.lower() in SUFFIXES)


def other_files(folder: Path) -> Counter[str]:
    """Return how many files of each suffix lie under a folder that may be pictures but are not read."""
    return Counter(path.suffix.lower() for path in _files(folder) if path.suffix.lower() in _PICTURES)


def _files(folder: Path) -> list[Path]:
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # A link that leads back would never end.
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return found


def read_image(
    path: Path, preparation: Preparation | None = None, *, grey: bool | None = None, alpha: str | None = None
) -> Tensor:
    """Read one image file as float32 (C, H, W) in [0, 1].

    Args:
        path: the file.
        preparation: how it is brought to the model's size; None leaves the size.
        grey: one channel in place of three; by default as the preparation has it.
        alpha: what to do with transparent pixels; see :func:`rsplugins.data.pixels.decode`.

    Raises:
        UnreadableInputError: the file is no readable image, or one that cannot be read right.
    """
    if grey is None:
        grey = preparation is not None and preparation.channels == 1
    picture = decode(path, grey=grey, alpha=alpha)
    return (picture if preparation is None else preparation(picture)).tensor()


def stored_sizes(files: Sequence[tuple[Path, int]]) -> list[tuple[int, int] | None]:
    """Return (width, height) of a few of the files, spread over all: whether a data set is at one size already."""
    count = min(_PEEKS, len(files))
    return [stored_size(files[(len(files) - 1) * k // max(count - 1, 1)][0]) for k in range(count)]
