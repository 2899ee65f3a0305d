"""CIFAR's Python batches, read with an unpickler that makes arrays and nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsplugins.errors import InputValueError

_ALLOWED = {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "_frombuffer"), ("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0], name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return super().find_class(module, name)


def read_batches(paths: Sequence[Path], key: str) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """Read batches of CIFAR images.

    Args:
        paths: batch files: pickled dictionaries with ``data``, (N, 3072) uint8, and a list under ``key``.
        key: ``"labels"``, ``"fine_labels"``, or the names in the meta file, which has no images.

    Returns:
        Images (N, 32, 32, 3) uint8, and the list.

    Raises:
        InputValueError: a file that is no such dictionary, or that would run code.
    """
    images: list[np.ndarray[Any, Any]] = [np.zeros((0, 3072), dtype=np.uint8)]
    values: list[Any] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _ArraysOnly(file, encoding="latin1").load()
            values += list(batch[key])
            images.append(np.asarray(batch.get("data", images[0]), dtype=np.uint8).reshape(-1, 3072))
        except (
            pickle.UnpicklingError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            ImportError,
            IndexError,
        ) as error:
            raise InputValueError(f"{path} is not a CIFAR batch: {error!r}.", fix="Download the data set again.") from error
    return np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), values
