"""One image file as planes of pixels in [0, 1]: every kind of file is read right, or refused by name.

Stored sample values are taken as they are: no gamma (PNG's gAMA) and no colour profile is applied, as in the field's loaders;
CMYK becomes RGB by (1 - C)(1 - K). The EXIF orientation is applied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsplugins.data.dataset import image_tensor
from rsplugins.errors import ParameterError, UnreadableInputError

ALPHA = ("drop", "white", "black")
"""What may be done with transparent pixels when it is asked for."""

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, struct.error, zlib.error)
"""What Pillow raises on files that are damaged or no images."""
_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_WITH_ALPHA = ("LA", "PA", "RGBA")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation to what brings the picture upright."""
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339


@dataclass(frozen=True)
class Picture:
    """A decoded image: one 8-bit Pillow image (L or RGB), or, for deeper files, one float image (mode F, [0, 1]) a channel."""

    planes: tuple[Image.Image, ...]

    @property
    def deep(self) -> bool:
        """Whether pixels have more than 8 bits."""
        return self.planes[0].mode == "F"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.planes[0].size

    def tensor(self) -> Tensor:
        """Return float32 (C, H, W) in [0, 1]."""
        if not self.deep:
            return image_tensor(self.planes[0])
        # Bicubic and Lanczos filters overshoot; 8-bit images are cut off at the same ends.
        return torch.from_numpy(np.stack([np.asarray(plane, dtype=np.float32) for plane in self.planes])).clamp_(0, 1)


def check_alpha(alpha: str | None) -> str | None:
    """Return what to do with transparent pixels, checked.

    Raises:
        ParameterError: not one of :data:`ALPHA`.
    """
    if alpha is not None and alpha not in ALPHA:
        raise ParameterError(f"alpha is {alpha!r}.", fix=f"Use one of: {', '.join(ALPHA)}; or leave it out.")
    return alpha


def decode(path: Path, *, grey: bool = False, alpha: str | None = None) -> Picture:
    """Read one image file, upright.

    Args:
        path: the file. 8 bits a channel in any of Pillow's colour modes; 16 bits, divided by 65535; floats in [0, 1].
        grey: return one channel (ITU-R 601 luma) in place of three.
        alpha: what to do with pixels that are not opaque: ``"drop"`` their alpha, or put them on ``"white"`` or ``"black"``; None
            refuses them, because they have no colour of their own.

    Raises:
        UnreadableInputError: damaged, no image, or an image with no one right reading: an animation, integers without a known
            scale, floats outside [0, 1], transparent pixels.
    """
    try:
        with Image.open(path) as file:
            return _decode(path, file, grey, alpha)
    except UnreadableInputError:
        raise
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise UnreadableInputError(
            f"{path} is not a readable image: {error}", fix="Repair the file or take it out of the folder."
        ) from error


def stored_size(path: Path) -> tuple[int, int] | None:
    """Return an image's (width, height) as stored, from its header; None when it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.size
    except (*_DAMAGED, Image.DecompressionBombError):
        return None


def _decode(path: Path, file: Image.Image, grey: bool, alpha: str | None) -> Picture:
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # a camera's MPO is a photograph with previews behind it
        raise _refusal(path, f"holds {frames} pictures (an animation, or pages)", "Store the one that is meant by itself.")
    wide = ";16" in str([tile[3] for tile in getattr(file, "tile", ())]) and file.mode in ("RGB", "RGBA", "LA")
    file.load()  # a TIFF is turned here, by Pillow
    turn = _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    if wide and file.format != "PPM":  # Pillow rescales PPM, and cuts the others off
        planes = _colour_planes(_wide_colour(path, file, alpha), grey)
    elif file.mode in _EIGHT_BITS or file.mode in _WITH_ALPHA:
        planes = (_eight_bits(path, file, grey, alpha),)
    else:
        planes = (_floats(_scaled(path, file)),) * (1 if grey else 3)
    return Picture(planes if turn is None else tuple(plane.transpose(turn) for plane in planes))


def _eight_bits(path: Path, image: Image.Image, grey: bool, alpha: str | None) -> Image.Image:
    if _tag(image, _SAMPLE_FORMAT, 1) != 1:
        raise _refusal(path, "holds signed integers", "Convert it to unsigned 8 or 16 bits.")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = _opaque(path, image.convert("RGBA"), alpha)
    if image.mode in ("1", "L"):
        image = image.convert("L")
        return image if grey else image.convert("RGB")
    image = image.convert("RGB")
    return image.convert("L") if grey else image


def _opaque(path: Path, image: Image.Image, alpha: str | None) -> Image.Image:
    lowest, _ = image.getchannel("A").getextrema()
    if lowest == 255 or alpha == "drop":
        return image.convert("RGB")
    if alpha is None:
        raise _transparent(path)
    ground = Image.new("RGBA", image.size, alpha)
    return Image.alpha_composite(ground, image).convert("RGB")


def _transparent(path: Path) -> UnreadableInputError:
    return _refusal(
        path,
        "has transparent pixels, which have no colour of their own",
        "Say what they are: --data-option alpha=white, black or drop.",
    )


def _scaled(path: Path, image: Image.Image) -> Any:
    """Return grey values of more than 8 bits as float32 (H, W) in [0, 1]."""
    if "transparency" in image.info:
        raise _transparent(path)
    if _tag(image, _PHOTOMETRIC, 1) == 0:
        raise _refusal(path, "counts its grey levels from white to black", "Convert it to 8 bits, or to PNG.")
    array = np.asarray(image)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen and _tag(image, _SAMPLE_FORMAT, 1) == 1 and _tag(image, _BITS, 16) == 16:
        return array.astype(np.float32) / np.float32(65535)
    if image.mode != "F":
        raise _refusal(
            path,
            f"holds {array.dtype} values in Pillow's mode {image.mode!r}, of no known scale",
            "Convert it to 8 or 16 unsigned bits, or to floats in [0, 1].",
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise _refusal(path, f"holds floats from {low:g} to {high:g}", "Bring them to [0, 1], where pixels of this package lie.")
    return array.astype(np.float32)


def _wide_colour(path: Path, file: Image.Image, alpha: str | None) -> Any:
    """Return 16-bit colours of a PNG as float32 (C, H, W); Pillow keeps their upper half only."""
    array = None
    if file.format == "PNG" and "transparency" not in file.info:
        from torchvision.io import ImageReadMode, decode_png

        decoded = decode_png(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
        array = decoded.to(torch.int32).numpy() if decoded.dtype == torch.uint16 else None
    if array is None:
        raise _refusal(path, "has colours of 16 bits, of which only 8 could be read", "Convert it to 8 bits, or to a 16-bit PNG.")
    values = array.astype(np.float32) / np.float32(65535)
    if len(values) in (2, 4):
        values, cover = values[:-1], values[-1:]
        if alpha is None and cover.min() < 1:
            raise _transparent(path)
        values = values if alpha in (None, "drop") else values * cover + (alpha == "white") * (1 - cover)
    return values


def _colour_planes(values: Any, grey: bool) -> tuple[Image.Image, ...]:
    if grey and len(values) == 3:
        values = np.tensordot(np.asarray([0.299, 0.587, 0.114], dtype=np.float32), values, 1)[None]
    elif not grey and len(values) == 1:
        values = values.repeat(3, axis=0)
    return tuple(map(_floats, values))


def _floats(values: Any) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Return the first value of a TIFF's tag; the default for other files."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, Sequence) else value)


def _refusal(path: Path, what: str, fix: str) -> UnreadableInputError:
    return UnreadableInputError(f"{path} {what}; it is not read.", cause="there is no one right way to.", fix=fix)
