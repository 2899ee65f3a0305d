"""Where inputs come from: ``load("digits")``, ``load("cifar10", root=...)``, ``load("folder:PATH")``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rsplugins.data.dataset import Dataset
from rsplugins.errors import PluginError

__all__ = ["DEFAULT_DATASET", "Dataset", "load"]

DEFAULT_DATASET = "digits"
"""What is certified when nobody names a data set: embedded in scikit-learn."""


def load(reference: str, root: str | Path | None = None, split: str = "test", input_size: Sequence[int] | None = None) -> Dataset:
    """Load a data set by name, through the host: built-in ones and those of plugins alike.

    Args:
        reference: ``"mnist"``, or ``"folder:PATH"``: a name, and after a colon what it takes.
        root: directory of the data sets; else the environment variable ``RSPLUGINS_DATA``, else ``./data``.
        split: ``"test"``, ``"train"``, or what the data set calls it.
        input_size: (C, H, W) of the model; images that come in many sizes are resized (short side) and centre-cropped to it.

    Returns:
        The data set: raw [0, 1] pixels, stable indices.

    Raises:
        UnknownNameError: nobody registered that name; with a did-you-mean.
        DataNotFoundError: what was looked for, where, and how to get it.
        ParameterError: there is no such split.

    Example:
        >>> data = load("digits")
        >>> len(data), data.num_classes, data.input_size
        (360, 10, (1, 8, 8))
    """
    from rsplugins.host import get_host

    name, _, argument = reference.partition(":")
    found = get_host().find("dataset", name)
    # Only folder-like sources have something after the colon; the others get their own name.
    dataset = found.load()(argument or name, root=root, split=split, input_size=input_size)
    if not isinstance(dataset, Dataset):
        raise PluginError(f"The data set {name!r} returned {type(dataset).__name__} instead of rsplugins.data.Dataset.")
    return dataset
