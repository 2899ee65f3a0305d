"""The contract of a data set: raw pixels, labels that are classes, the same input at the same index for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsplugins.data import Dataset, load
from rsplugins.errors import RspluginsError
from rsplugins.testing.outcome import BrokenContractError, Check, require

READ = 24
"""Inputs that are read, spread over the data set."""


def dataset_checks(
    name: str, *, reference: str = "", root: str | Path | None = None, split: str = "test", **options: Any
) -> list[Check]:
    """Return the checks that any data set can be put through.

    Args:
        name: as ``rsplugins plugins list`` shows it.
        reference: what follows the colon in ``name:REFERENCE``.
        root: where data sets lie.
        split: which is checked.
        options: of the data set.
    """
    full = f"{name}:{reference}" if reference else name

    def data(which: str = split, **more: Any) -> Dataset:
        return load(full, root=root, split=which, **options, **more)

    return [
        Check("data set", lambda: _dataset(data(), name, split)),
        Check("images", lambda: _images(data())),
        Check("labels", lambda: _labels(data())),
        Check("length", lambda: _length(data())),
        Check("the same when read again", lambda: _again(data())),
        Check("the same when loaded again", lambda: _repeatable(data(), data())),
        Check("split errors", lambda: _refused(lambda: data("no-such-split"), "no-such-split", "split")),
        Check("option errors", lambda: _refused(lambda: data(no_such_option=1), "no_such_option", "option")),
    ]


def _chosen(data: Dataset) -> list[int]:
    count = len(data.labels)
    return sorted({count * k // READ for k in range(READ)} & set(range(count)))


def _dataset(data: Dataset, name: str, split: str) -> str:
    require(len(data.labels) > 0, "it has no inputs")
    require(data.name.partition(":")[0] == name, f"its name is {data.name!r}, by which it cannot be loaded again")
    require(data.split == split, f"its split is {data.split!r}; {split!r} was asked for")
    return repr(data)


def _images(data: Dataset) -> str:
    for index in _chosen(data):
        image = data[index][0]
        require(isinstance(image, Tensor), f"image {index} is a {type(image).__name__}, not a tensor")
        require(image.dtype == torch.float32, f"image {index} is {image.dtype}; expected torch.float32")
        shape = tuple(image.shape)
        require(image.dim() in (3, 4), f"image {index} has shape {shape}; expected (C, H, W), or (C, T, H, W) for a video")
        require(bool(image.isfinite().all()), f"image {index} has values that are not finite")
        low, high = float(image.min()), float(image.max())
        require(low >= 0 and high <= 1, f"image {index} has values from {low:.4g} to {high:.4g}; raw pixels lie in [0, 1]")
        size = data.input_size
        require(size is None or shape == size, f"image {index} has shape {shape}; input_size says {size}")
    largest = max(float(data[index][0].max()) for index in _chosen(data))
    require(largest > 1 / 64, f"no pixel is above {largest:.3g}: were the images divided by 255 twice?")
    return f"{len(_chosen(data))} images, float32 in [0, 1]"


def _labels(data: Dataset) -> str:
    labels = np.asarray(data.labels)
    require(labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer), f"labels are {labels.dtype} of shape {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    require(
        low >= 0 and high < data.num_classes, f"labels go from {low} to {high}; there are {data.num_classes} classes, from 0 on"
    )
    names = data.classes
    require(names is None or len(names) == data.num_classes, f"there are {data.num_classes} classes and {len(names or ())} names")
    for index in _chosen(data):
        label = data[index][1]
        require(type(label) is int, f"label {index} is a {type(label).__name__}, not an int")
        require(label == labels[index], f"input {index} comes with label {label}; labels[{index}] is {labels[index]}")
    return f"{low} to {high}, {data.num_classes} classes"


def _length(data: Dataset) -> str:
    require(len(data) == len(data.labels), f"it has length {len(data)} and {len(data.labels)} labels")
    image, _ = data[len(data) - 1]
    require(isinstance(image, Tensor), "the last input cannot be read")
    for index in (len(data), -1):
        try:
            data[index]
        except IndexError:
            continue
        raise BrokenContractError(f"index {index} gave an input; it has those from 0 to {len(data) - 1}")
    return f"{len(data)} inputs; none before or behind them"


def _again(data: Dataset) -> str:
    """Order, earlier reads, what a reader does to an image, and global generators change nothing."""
    chosen = _chosen(data)
    first = {}
    for index in chosen:
        image = data[index][0]
        first[index] = image.clone()
        image.mul_(0)  # of its own: a reader that hands out its memory would be changed
    state, numpy_state = torch.get_rng_state(), np.random.get_state()
    try:
        for seed, index in enumerate(reversed(chosen)):
            torch.manual_seed(seed)
            np.random.seed(seed)
            same = torch.equal(data[index][0], first[index])
            require(same, f"image {index} is another one when it is read again: an index names one input for ever")
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)
    return f"{len(chosen)} images, read twice in two orders"


def _repeatable(first: Dataset, second: Dataset) -> str:
    require(np.array_equal(first.labels, second.labels), "loaded twice, it has other labels")
    for index in _chosen(first):
        same = torch.equal(first[index][0], second[index][0])
        require(same, f"loaded twice, image {index} is another one")
    digests = [each.describe().get("sha256") for each in (first, second)]
    require(digests[0] == digests[1], f"loaded twice, its digest is {digests[0]} and {digests[1]}: no run could be resumed")
    return f"sha256 {str(digests[0])[:12]}"


def _refused(attempt: Any, name: str, what: str) -> str:
    try:
        attempt()
    except RspluginsError as error:
        require(name in error.what, f"the error does not name the {what}: {error.what}")
        return f"an unknown {what} is refused by name"
    except Exception as error:
        raise BrokenContractError(
            f"an unknown {what} raised {type(error).__name__}: {error}. Raise rsplugins.errors.ParameterError."
        ) from None
    raise BrokenContractError(f"an unknown {what} was accepted")
