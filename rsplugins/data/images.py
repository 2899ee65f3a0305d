"""Image files: finding them class by class, and preparing them at one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rsplugins.data.dataset import image_tensor
from rsplugins.errors import ParameterError, UnreadableInputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def class_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that are classes, sorted by name; hidden ones are none."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Return the images under a folder, at any depth, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def preparation(input_size: Sequence[int] | None, crop: float) -> str:
    """Say in words what :func:`read_image` does to an image."""
    if input_size is None:
        return ""
    channels, height, width = _image_size(input_size)
    short = _short_side(height, width, crop)
    return f"short side resized to {short} (bicubic), centre crop {height}x{width}, {channels} channels; unchanged at that size"


def read_image(path: Path, input_size: Sequence[int] | None = None, crop: float | None = 1.0) -> Tensor:
    """Read one image file as float32 (C, H, W) in [0, 1].

    Args:
        path: the file.
        input_size: (C, H, W): the short side is resized (bicubic, with antialiasing, back to 8 bits) to ``max(H, W) / crop``, the
            centre is cropped; C = 1 gives grey. None leaves the size, in RGB.
        crop: side of the crop over the resized short side; 0.875 is the custom on ImageNet. None leaves the size as stored.

    Raises:
        UnreadableInputError: the file is no readable image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("L" if input_size is not None and input_size[0] == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UnreadableInputError(
            f"{path} is not a readable image: {error}", fix="Repair the file or take it out of the folder."
        ) from error
    if input_size is not None and crop is not None:
        _, height, width = _image_size(input_size)
        image = _fit(image, height, width, crop)
    return image_tensor(image)


def _fit(image: Image.Image, height: int, width: int, crop: float) -> Image.Image:
    if image.size == (width, height):
        return image
    scale = _short_side(height, width, crop) / min(image.size)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _short_side(height: int, width: int, crop: float) -> int:
    return round(max(height, width) / crop)


def _image_size(input_size: Sequence[int]) -> tuple[int, int, int]:
    if len(input_size) != 3 or input_size[0] not in (1, 3):
        raise ParameterError(
            f"input_size is {tuple(input_size)}; images are prepared at (1, H, W) or (3, H, W).",
            cause="a video model, or a model of unusual inputs.",
            fix="Prepare the inputs yourself and use rsplugins.certify on tensors.",
        )
    return int(input_size[0]), int(input_size[1]), int(input_size[2])
