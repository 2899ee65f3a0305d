"""``moving-digits``: short videos generated from scikit-learn's digits; the class is how the digit moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rsplugins.data.dataset import Dataset, check_split
from rsplugins.data.digits import TEST_EVERY
from rsplugins.errors import ParameterError

CLASSES = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SIDE = 16
DEFAULT_FRAMES = 32
LENGTHS = {"train": 4000, "test": 1000}
_SEED = 20_261


def load(
    reference: str = "moving-digits",
    *,
    root: str | Path | None = None,
    split: str = "test",
    input_size: Sequence[int] | None = None,
) -> Dataset:
    """Return the videos: (1, T, 16, 16), eight classes in turn, 4,000 to train on and 1,000 to test.

    Video i shows one digit of the split's own digits that moves across a torus, rotates, grows or shrinks, at a speed and from a
    start drawn from (seed, split, i) alone; so any prefix of a longer video shows the same class.

    Args:
        reference: ``"moving-digits"``, or the number of frames T (``moving-digits:64``); 32 by default.
        root: unused, the digits are inside scikit-learn.
        split: ``"test"`` or ``"train"``; no digit is in both.
        input_size: what a model takes; its channels and sides must be (1, 16, 16), its frames may be fewer.

    Raises:
        ParameterError: another split, size, or number of frames.
    """
    del root
    from sklearn.datasets import load_digits

    check_split("moving-digits", split, tuple(LENGTHS))
    frames = DEFAULT_FRAMES if reference == "moving-digits" else _frames(reference)
    if input_size is not None and (len(input_size) != 4 or (input_size[0], *input_size[2:]) != (1, SIDE, SIDE)):
        raise ParameterError(
            f"moving-digits are (1, T, {SIDE}, {SIDE}) videos; the model takes {tuple(input_size)}.",
            cause="a model for another data set.",
            fix=f"Use a video model for (1, T, {SIDE}, {SIDE}).",
        )
    bunch = load_digits()
    is_test = np.arange(len(bunch.target)) % TEST_EVERY == 0
    images = bunch.images[is_test if split == "test" else ~is_test] / 16.0
    offset = 0 if split == "train" else LENGTHS["train"]
    return Dataset(
        name="moving-digits" if frames == DEFAULT_FRAMES else f"moving-digits:{frames}",
        split=split,
        labels=[index % len(CLASSES) for index in range(LENGTHS[split])],
        read=lambda index: video(images, index % len(CLASSES), frames, np.random.default_rng([_SEED, offset + index])),
        classes=CLASSES,
        input_size=(1, frames, SIDE, SIDE),
    )


def video(images: npt.NDArray[np.float64], label: int, frames: int, rng: np.random.Generator) -> Tensor:
    """Render one video, (1, T, 16, 16) float32 in [0, 1].

    Args:
        images: digits to choose from, (N, 8, 8) in [0, 1].
        label: index into :data:`CLASSES`.
        frames: T.
        rng: draws the digit, the start, the speed.
    """
    from scipy.ndimage import map_coordinates

    digit = images[rng.integers(len(images))]
    start, speed, angle = rng.uniform(0, SIDE, 2), rng.uniform(0.4, 0.8), rng.uniform(-0.3, 0.3)
    time = np.arange(frames)[:, None, None]
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    shift = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}.get(CLASSES[label], (0, 0))
    turn = {"clockwise": -1, "counter-clockwise": 1}.get(CLASSES[label], 0)
    growth = {"growing": 1, "shrinking": -1}.get(CLASSES[label], 0)
    # Coordinates around the digit's centre; the torus makes a digit that leaves come back on the other side.
    y = (rows[None] - start[0] - shift[0] * speed * time + SIDE / 2) % SIDE - SIDE / 2
    x = (columns[None] - start[1] - shift[1] * speed * time + SIDE / 2) % SIDE - SIDE / 2
    phase = (time * speed / 8) % 2.0
    scale = np.exp(growth * (phase - 1.0) * 0.5) if growth else np.ones_like(phase)
    theta = angle + turn * speed * time / 2
    source_y = (np.cos(theta) * y + np.sin(theta) * x) / scale + 3.5
    source_x = (-np.sin(theta) * y + np.cos(theta) * x) / scale + 3.5
    rendered = map_coordinates(digit, [source_y, source_x], order=1, mode="constant", cval=0.0)
    return torch.from_numpy(np.clip(rendered, 0.0, 1.0).astype(np.float32))[None]


def _frames(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 1024:
        raise ParameterError(
            f"moving-digits:{text}: expected a number of frames from 2 to 1024.", fix="Use moving-digits:64, say."
        )
    return int(text)
