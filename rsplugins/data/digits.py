"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8x8, with a fixed split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rsplugins.data.dataset import Dataset, check_split
from rsplugins.errors import ParameterError

TEST_EVERY = 5
"""Images 0, 5, 10, ... are the test split (360); the other 1,437 are the training split."""


def load(
    reference: str = "digits", *, root: str | Path | None = None, split: str = "test", input_size: Sequence[int] | None = None
) -> Dataset:
    """Return scikit-learn's digits: (1, 8, 8), pixels divided by 16, classes 0 to 9.

    Args:
        reference: ``"digits"``; there is no argument.
        root: unused, the data are inside scikit-learn.
        split: ``"test"`` (every fifth image, 360) or ``"train"`` (the other 1,437).
        input_size: must be (1, 8, 8) when given.

    Raises:
        ParameterError: another split or size.
    """
    del reference, root
    from sklearn.datasets import load_digits

    check_split("digits", split, ("train", "test"))
    if input_size is not None and tuple(input_size) != (1, 8, 8):
        raise ParameterError(
            f"digits are (1, 8, 8) images; the model takes {tuple(input_size)}.",
            cause="a model for another data set.",
            fix="Use a model for 8x8 digits, or other data: --data REF (rsplugins.data.load).",
        )
    bunch = load_digits()
    is_test = np.arange(len(bunch.target)) % TEST_EVERY == 0
    chosen = is_test if split == "test" else ~is_test
    images = torch.from_numpy(bunch.images[chosen]).float().div(16).unsqueeze(1)
    return Dataset(
        name="digits",
        split=split,
        labels=bunch.target[chosen],
        read=lambda index: images[index].clone(),
        classes=[str(digit) for digit in range(10)],
        input_size=(1, 8, 8),
    )
