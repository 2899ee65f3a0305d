"""``folder:PATH``: any folder of images with one sub-folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsplugins.data.dataset import Dataset, data_root, not_found
from rsplugins.data.images import class_folders, image_files, other_files, read_image, stored_sizes
from rsplugins.data.pixels import check_alpha
from rsplugins.data.preparation import Preparation, plan
from rsplugins.errors import DataNotFoundError, ParameterError, did_you_mean, warn

_SPLIT_NAMES = {"test": ("test", "val", "validation"), "val": ("val", "validation"), "train": ("train", "training")}
_ORDERS = ("natural", "lexicographic")
_SHOWN = 5


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
    classes: str | Sequence[Any] | None = None,
    class_order: str | None = None,
) -> Dataset:
    """Return the images under a folder, by class and then by path.

    Args:
        reference: the folder; when it is relative and not in the working directory, it is looked for in the data root.
        root: the data root.
        split: ``PATH/test`` (or ``val``) is used where there is one, and so on; otherwise PATH itself holds the classes.
        input_size: (C, H, W) that images are brought to, as part of the data; see :func:`rsplugins.data.preparation.plan`.
        preparation: what the model's own configuration says about it.
        resize: short side in pixels, or (H, W), that images are resized to.
        crop: side of the centre crop in pixels, (H, W), or a fraction of the resized side.
        interpolation: ``bicubic``, ``bilinear``, ``nearest``, ``lanczos``, ``box`` or ``hamming``.
        crop_mode: ``center``, ``squash`` (the aspect ratio is lost) or ``border`` (filled up around).
        alpha: what to do with transparent pixels, which are refused by default: ``drop``, ``white`` or ``black``.
        classes: all class names in the order of the model's outputs, a list or a file with one a line; every sub-folder is one of
            them, and a class may have no sub-folder.
        class_order: ``natural`` (1, 2, 10), the default, or ``lexicographic`` (1, 10, 2), as torchvision's ImageFolder has it.

    Labels are the positions of the class names. (For a part of ImageNet's classes use ``imagenet``, whose labels are ImageNet's
    own.)

    Raises:
        DataNotFoundError: no such folder, or no images in it.
        ParameterError: an option that is none, or classes that are not those of the folder.
    """
    folder = _find(reference, root, split)
    chosen = next((folder / name for name in _SPLIT_NAMES.get(split, (split,)) if (folder / name).is_dir()), folder)
    folders = class_folders(chosen)
    names, note = _classes([entry.name for entry in folders], classes, class_order)
    label = {name: position for position, name in enumerate(names)}
    files = [
        (path, label[entry.name]) for entry in sorted(folders, key=lambda entry: label[entry.name]) for path in image_files(entry)
    ]
    if not files:
        raise DataNotFoundError(
            f"There are no images in sub-folders of {chosen}.",
            cause=f"the images lie directly in the folder, or in another format{_found(folders)}.",
            fix=f"Arrange them as {chosen}/CLASS/IMAGE.png, one sub-folder a class.",
        )
    _say_what_is_left_out(chosen, folders, {label for _, label in files}, label)
    options = {"resize": resize, "crop": crop, "interpolation": interpolation, "crop_mode": crop_mode}
    dataset = image_dataset(
        f"folder:{folder.resolve().name}",
        split if chosen != folder else "all",
        files,
        names,
        plan(input_size, options, preparation, stored_sizes(files)),
        alpha,
    )
    dataset.preparation = "; ".join(text for text in (dataset.preparation, note) if text)
    return dataset


def image_dataset(
    name: str,
    split: str,
    files: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    preparation: Preparation | None,
    alpha: str | None = None,
) -> Dataset:
    """Return a Dataset over image files with labels, prepared where there is a preparation."""
    check_alpha(alpha)
    # One block of bytes: a million paths as objects would be copied, a page at a time, into every process that reads them.
    paths = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    grey = preparation is not None and preparation.channels == 1
    words = [str(preparation or ""), f"transparent pixels: {alpha}" if alpha else ""]
    return Dataset(
        name=name,
        split=split,
        labels=[label for _, label in files],
        read=partial(_read, paths, preparation, grey, alpha),
        original=partial(_read, paths, None, grey, alpha),
        classes=classes,
        input_size=None if preparation is None else preparation.input_size,
        preparation="; ".join(filter(None, words)),
    )


def _read(paths: Any, preparation: Preparation | None, grey: bool, alpha: str | None, index: int) -> Tensor:
    return read_image(Path(os.fsdecode(paths[index])), preparation, grey=grey, alpha=alpha)


def _classes(found: list[str], classes: str | Sequence[Any] | None, order: str | None) -> tuple[list[str], str]:
    """Return the class names in the order of their labels, and what a record says about that order."""
    if classes is not None:
        if order is not None:
            raise ParameterError("classes and class_order are both given.", fix="The list is an order: leave class_order out.")
        return _listed(found, classes), "classes in the order of a list"
    if order not in (None, *_ORDERS):
        raise ParameterError(f"class_order is {order!r}.", fix=f"Use one of: {', '.join(_ORDERS)}.")
    plain = sorted(found)
    if plain == found:
        return found, ""
    if order == "lexicographic":
        return plain, "classes in lexicographic order"
    if order is None:
        at = next(position for position, pair in enumerate(zip(found, plain, strict=True)) if pair[0] != pair[1])
        warn(
            f"the classes are numbered in natural order: {', '.join(found[: at + 2])}, ...; torchvision's ImageFolder would "
            f"number them {', '.join(plain[: at + 2])}, ... "
            "For a model trained that way give class_order=lexicographic; or give classes=FILE."
        )
    return found, "classes in natural order"


def _listed(found: list[str], classes: str | Sequence[Any]) -> list[str]:
    if isinstance(classes, str):
        path = Path(classes).expanduser()
        if path.is_file():
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif "," in classes:
            names = [name.strip() for name in classes.split(",")]
        else:
            raise ParameterError(f"classes is {classes!r}: no such file.", fix="Give a file with one name a line, or a,b,c.")
    else:
        names = [str(name) for name in classes]
    twice = [name for name, times in Counter(names).items() if times > 1]
    foreign = [name for name in found if name not in set(names)]
    if twice or foreign or not names:
        problem = f"names {twice[0]!r} twice" if twice else f"does not name the folder {foreign[0]!r}" if foreign else "is empty"
        more = f" and {len(foreign) - 1} others" if len(foreign) > 1 and not twice else ""
        guess = did_you_mean(foreign[0], names) if foreign and not twice else ""
        raise ParameterError(f"The list of classes {problem}{more}.{guess}", fix="List each class once, with its folder's name.")
    return names


def _say_what_is_left_out(chosen: Path, folders: Sequence[Path], labels: set[int], label: Mapping[str, int]) -> None:
    empty = [entry.name for entry in folders if label[entry.name] not in labels]
    if empty:
        warn(
            f"{len(empty)} of {len(folders)} class folders of {chosen} hold no images{_found(folders)} and count as classes: "
            f"{', '.join(empty[:_SHOWN])}{', ...' if len(empty) > _SHOWN else ''}"
        )
    left = sum(other_files(chosen).values()) if not empty else 0
    if left:
        warn(f"{left} files of {chosen} are not read as images{_found([chosen])}")


def _found(folders: Sequence[Path]) -> str:
    """Say which other files are there."""
    counts: Counter[str] = sum((other_files(folder) for folder in folders), Counter())
    return (
        f" (there are {', '.join(f'{count} {suffix or chr(39) * 2}' for suffix, count in counts.most_common(_SHOWN))})"
        if counts
        else ""
    )


def _find(reference: str, root: str | Path | None, split: str) -> Path:
    given = Path(reference).expanduser()
    places = [given] if given.is_absolute() else [given, data_root(root) / given]
    for place in places:
        if place.is_dir():
            return place
    archive = next((place for place in places if place.is_file()), None)
    how = f"{archive} is a file: unpack it first (tar -xf)." if archive else "Check the path."
    raise not_found(f"folder:{reference}", split, "a folder", places, how)
