"""``ucf101``: UCF-101 in its own layout, decoded with PyAV (the extra ``video``).

Layout, as the data set is distributed: ``UCF-101/<Class>/v_<Class>_g01_c01.avi`` and ``ucfTrainTestlist/`` with ``classInd.txt``,
``trainlist01.txt`` to ``testlist03.txt``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.data.dataset import Dataset, check_split, data_root, not_found
from rsplugins.errors import DataNotFoundError, ParameterError, UnreadableInputError

DEFAULT_FRAMES = 64
DEFAULT_SIDE = 112
_LISTS = {
    f"{part}{number if number > 1 else ''}": f"{part}list0{number}.txt" for part in ("train", "test") for number in (1, 2, 3)
}


def load(
    reference: str = "ucf101",
    *,
    root: str | Path | None = None,
    split: str = "test",
    input_size: Sequence[int] | None = None,
) -> Dataset:
    """Return the videos of one of the official splits: (3, T, H, W), the first T frames, raw [0, 1] pixels.

    Args:
        reference: ``"ucf101"``, or the number of frames T (``ucf101:128``); 64 by default.
        root: the directory that holds ``UCF-101/`` and ``ucfTrainTestlist/``, or the data root with a ``ucf101/`` that does.
        split: ``"test"`` and ``"train"`` are split 1; ``"test2"``, ``"train3"`` and so on the others.
        input_size: (3, t, H, W) of the model: each frame's short side is resized (bilinear, with antialiasing) to max(H, W) * 8/7
            and the centre cropped, as part of the data. H = W = 112 by default. t may be smaller than T: chunks of the video.

    A video that is empty, damaged or shorter than T frames raises UnreadableInputError when it is read; runs record that input as
    failed and go on.

    Raises:
        DataNotFoundError: a folder, list or video file is missing.
        ParameterError: another split, or a number of frames that is none.
    """
    check_split("ucf101", split, tuple(_LISTS))
    frames = DEFAULT_FRAMES if reference == "ucf101" else _frames(reference)
    if input_size is not None and (len(input_size) != 4 or input_size[0] != 3):
        raise ParameterError(f"ucf101 are (3, T, H, W) videos; the model takes {tuple(input_size)}.", fix="Use a video model.")
    folder = _find(root, split)
    classes = _classes(folder / "ucfTrainTestlist" / "classInd.txt")
    files = _files(folder, split, classes)
    height, width = (DEFAULT_SIDE, DEFAULT_SIDE) if input_size is None else (int(input_size[2]), int(input_size[3]))
    return Dataset(
        name="ucf101" if frames == DEFAULT_FRAMES else f"ucf101:{frames}",
        split=split,
        labels=[label for _, label in files],
        read=partial(_read, files, frames, (height, width)),
        original=partial(_read, files, frames, None),
        classes=classes,
        input_size=(3, frames, height, width),
        preparation=f"first {frames} frames, short side {_short_side(height, width)} (bilinear), centre crop {height}x{width}",
    )


def read_video(path: Path, frames: int, size: tuple[int, int] | None) -> Tensor:
    """Decode the first frames of a video file with PyAV, resized and cropped.

    Args:
        path: the file.
        frames: T.
        size: (H, W); None leaves the frames as stored.

    Returns:
        (3, T, H, W), float32 in [0, 1].

    Raises:
        UnreadableInputError: empty, damaged, without a video stream, or with fewer than T frames.
    """
    av: Any = importlib.import_module("av")
    pictures: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pictures.append(_prepare(frame.to_ndarray(format="rgb24"), size))
                if len(pictures) == frames:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UnreadableInputError(
            f"{path.name} cannot be decoded: {type(error).__name__}: {error}.",
            cause="an empty or damaged file, or one without a video stream.",
            fix=f"Check it with `ffprobe {path.name}`; the rest of the run goes on.",
        ) from error
    if len(pictures) < frames:
        raise UnreadableInputError(
            f"{path.name} has {len(pictures)} frames; {frames} were asked for.",
            cause="the video is shorter than a clip (or ends in a damaged part).",
            fix=f"Ask for fewer frames (ucf101:{max(len(pictures), 1)}); the rest of the run goes on.",
        )
    return torch.stack(pictures, dim=1)


def _read(files: Sequence[tuple[Path, int]], frames: int, size: tuple[int, int] | None, index: int) -> Tensor:
    return read_video(files[index][0], frames, size)


def _prepare(pixels: Any, size: tuple[int, int] | None) -> Tensor:
    picture = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()[None]
    if size is None:
        return picture[0] / 255
    scale = _short_side(*size) / min(picture.shape[-2:])
    target = [max(side, round(length * scale)) for side, length in zip(size, picture.shape[-2:], strict=True)]
    resized = F.interpolate(picture, size=target, mode="bilinear", antialias=True)[0]
    top, left = ((length - side) // 2 for length, side in zip(target, size, strict=True))
    # Back to 8 bits: what counts as raw are pixels that a file could hold.
    return resized[:, top : top + size[0], left : left + size[1]].round().clamp(0, 255) / 255


def _short_side(height: int, width: int) -> int:
    return round(max(height, width) * 8 / 7)


def _find(root: str | Path | None, split: str) -> Path:
    places = [data_root(root), data_root(root) / "ucf101"]
    for place in places:
        if (place / "UCF-101").is_dir() and (place / "ucfTrainTestlist" / _LISTS[split]).is_file():
            return place
    how = "Get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from the data set's own page and unpack both there."
    raise not_found("ucf101", split, f"UCF-101/ and ucfTrainTestlist/{_LISTS[split]}", places, how)


def _classes(path: Path) -> list[str]:
    if not path.is_file():
        raise not_found("ucf101", "all", "classInd.txt", [path], "It comes with the official splits.")
    return [line.split()[1] for line in path.read_text().splitlines() if line.strip()]


def _files(folder: Path, split: str, classes: Sequence[str]) -> list[tuple[Path, int]]:
    lines = (folder / "ucfTrainTestlist" / _LISTS[split]).read_text().splitlines()
    # Training lists name the label behind the file, test lists do not; the folder says it in both.
    names = [line.split()[0] for line in lines if line.strip()]
    unknown = sorted({name.split("/")[0] for name in names} - set(classes))
    if unknown:
        raise DataNotFoundError(f"{_LISTS[split]} names classes that classInd.txt does not: {', '.join(unknown[:3])}.")
    files = [(folder / "UCF-101" / name, classes.index(name.split("/")[0])) for name in names]
    missing = [path for path, _ in files if not path.is_file()]
    if missing:
        how = f"{len(missing)} of {len(files)} files are missing; unpack the archive again."
        raise not_found("ucf101", split, missing[0].name, [missing[0].parent], how)
    return files


def _frames(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise ParameterError(f"ucf101:{text}: expected a number of frames from 1 to 4096.", fix="Use ucf101:128, say.")
    return int(text)
