"""How a photograph of any size becomes an input of the model's size: one rule for every source of image files.

From weakest to strongest: the field's custom on ImageNet (bicubic, the crop is 7/8 of the resized short side), what the model's
own configuration says, what options say. An image that is already stored at the model's size stays as it is unless options say how
to prepare it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from rsplugins.data.pixels import Picture
from rsplugins.errors import ParameterError, did_you_mean

CROP = 0.875
"""Side of the crop over the resized short side: 224 of 256, as most ImageNet models are evaluated."""
INTERPOLATIONS = tuple(mode.value for mode in InterpolationMode if mode.value != "nearest-exact")
MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preparation:
    """What is done to a stored image; see :func:`plan`.

    Attributes:
        channels: 1 or 3.
        height: of what the model takes.
        width: of what the model takes.
        resize: (height, width) that the image is resized towards: its short side to the smaller one (``center``), exactly these
            (``squash``), or to lie inside (``border``).
        interpolation: a name of :data:`INTERPOLATIONS`; with antialiasing, as Pillow does it.
        mode: a name of :data:`MODES`.
        fill: grey levels (0 to 255) around an image that ``border`` leaves smaller than the crop, by channel.
        always: whether images that have the model's size are prepared too.
        origin: who said so, for records.
    """

    channels: int
    height: int
    width: int
    resize: tuple[int, int]
    interpolation: str = "bicubic"
    mode: str = "center"
    fill: tuple[int, ...] = (0, 0, 0)
    always: bool = False
    origin: str = ""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out."""
        return self.channels, self.height, self.width

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture prepared; images of 8 bits a channel stay so, as a file could hold them."""
        if picture.size == (self.width, self.height) and not self.always:
            return picture
        if not picture.deep:
            return Picture((self._fit(picture.planes[0], self.fill),))
        return Picture(tuple(self._fit(plane, (level / 255,)) for plane, level in zip(picture.planes, self.fill, strict=True)))

    def _fit(self, image: Image.Image, fill: tuple[float, ...]) -> Image.Image:
        resized: Image.Image = transforms.resize(image, self._target(image), InterpolationMode(self.interpolation))
        if self.mode == "border":
            resized = _bordered(resized, self.width, self.height, fill)
        cropped: Image.Image = transforms.center_crop(resized, [self.height, self.width])
        return cropped

    def _target(self, image: Image.Image) -> list[int]:
        height, width = self.resize
        if self.mode == "squash":
            return [height, width]
        if self.mode == "center" and height == width:
            return [height]  # the short side; the other follows, rounded down, as torchvision does it
        ratios = (image.height / height, image.width / width)
        ratio = max(ratios) if self.mode == "border" else min(ratios)  # as timm's ResizeKeepRatio
        return [round(image.height / ratio), round(image.width / ratio)]

    def __str__(self) -> str:
        height, width = self.resize
        sides = f"{height}" if height == width else f"{height}x{width}"
        how = {"center": "short side resized to", "squash": "squashed to", "border": "bordered, resized into"}[self.mode]
        text = f"{how} {sides} ({self.interpolation}), centre crop {self.height}x{self.width}, {self.channels} channels"
        text += "" if self.always else "; unchanged at that size"
        return f"{text}; {self.origin}" if self.origin else text


def plan(
    input_size: Sequence[int] | None,
    options: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    stored: Sequence[tuple[int, int] | None] = (),
) -> Preparation | None:
    """Decide how images are prepared.

    Args:
        input_size: (C, H, W) of the model; None when any size will do.
        options: ``resize`` (short side in pixels, or (H, W)), ``crop`` (side in pixels, (H, W), or a share of the resized side),
            ``interpolation``, ``crop_mode``; those that are None are not given.
        model: ``resize`` or ``crop_pct``, ``interpolation``, ``crop_mode``, ``mean`` of the model's own configuration.
        stored: (width, height) of some stored images: where all have the model's size already, nothing is cut off any.

    Returns:
        The preparation; None when images stay as they are stored.

    Raises:
        ParameterError: an option of the wrong name or value, or one that does not fit the model.
    """
    given = {key: value for key, value in options.items() if value is not None}
    share = _share(given.get("crop"))
    size = _size(input_size, None if share else given.get("crop"))
    if size is None:
        if given:
            raise ParameterError(
                f"{', '.join(given)} needs a size to prepare images at, and the model says none.",
                fix="Give crop=224, say; or give the model an input_size.",
            )
        return None
    channels, height, width = size
    ready = bool(stored) and all(pair == (width, height) for pair in stored)
    custom = {"crop_pct": 1.0 if ready else CROP, "interpolation": "bicubic", "crop_mode": "center"}
    own = {} if model is None or ready else {key: value for key, value in model.items() if value is not None}
    chosen = {**custom, **own, **given}
    resize = _resize(chosen, share, (height, width))
    mode = _one_of("crop_mode", chosen["crop_mode"], MODES)
    if mode != "border" and (resize[0] < height or resize[1] < width):
        raise ParameterError(
            f"resize is {resize[0]}x{resize[1]}, smaller than the crop {height}x{width}.",
            fix="Resize to at least the crop, or use crop_mode=border, which fills up.",
        )
    fill = tuple(round(255 * float(level)) for level in chosen.get("mean", (0.0,)))
    return Preparation(
        channels,
        height,
        width,
        resize,
        interpolation=_one_of("interpolation", chosen["interpolation"], INTERPOLATIONS),
        mode=mode,
        fill=fill if len(fill) == channels else fill[:1] * channels,
        always=bool(given),
        origin=_origin(given, own),
    )


def _origin(given: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    if given:
        return f"by the options {', '.join(f'{key}={value}' for key, value in given.items())}"
    return "by the model's own configuration" if own else ""


def _share(crop: Any) -> float | None:
    """Return ``crop`` as a fraction of the resized side, when it is one."""
    is_number = isinstance(crop, (int, float)) and not isinstance(crop, bool)
    return float(crop) if is_number and 0 < crop <= 1 else None


def _size(input_size: Sequence[int] | None, crop: Any) -> tuple[int, int, int] | None:
    side = None if crop is None else _pair("crop", crop)
    if input_size is None:
        return None if side is None else (3, *side)
    if len(input_size) != 3 or input_size[0] not in (1, 3):
        raise ParameterError(
            f"input_size is {tuple(input_size)}; images are prepared at (1, H, W) or (3, H, W).",
            cause="a video model, or a model of unusual inputs.",
            fix="Prepare the inputs yourself and use rsplugins.certify on tensors.",
        )
    channels, height, width = (int(length) for length in input_size)
    if side not in (None, (height, width)):
        raise ParameterError(
            f"crop is {crop}; the model takes {height}x{width}.",
            cause="the crop is what the model is given.",
            fix=f"Give crop={height}, or the model another input_size.",
        )
    return channels, height, width


def _resize(chosen: Mapping[str, Any], share: float | None, size: tuple[int, int]) -> tuple[int, int]:
    if share is None and "resize" in chosen:
        return _pair("resize", chosen["resize"])
    part = float(chosen["crop_pct"]) if share is None else share
    # Rounded down, as timm does it.
    return math.floor(size[0] / part), math.floor(size[1] / part)


def _pair(name: str, value: Any) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        also = ", or a fraction from 0 to 1" if name == "crop" else ""
        raise ParameterError(f"{name} is {value!r}; expected a side in pixels, or H,W{also}.", fix=f"Write {name}=224, say.")
    return sides[0], sides[1]


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ParameterError(f"{name} is {value!r}.{did_you_mean(str(value), known)}", fix=f"Use one of: {', '.join(known)}.")
    return str(value)


def _bordered(image: Image.Image, width: int, height: int, fill: tuple[float, ...]) -> Image.Image:
    """Return the image in the middle of a canvas that is at least (width, height)."""
    size = (max(width, image.width), max(height, image.height))
    canvas = Image.new(image.mode, size, fill[0] if len(fill) == 1 else fill)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
