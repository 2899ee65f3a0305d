"""Where inputs come from: ``load("digits")``, ``load("cifar10", root=...)``, ``load("folder:PATH")``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsplugins.data.dataset import Dataset
from rsplugins.errors import PluginError
from rsplugins.parameters import check_options

__all__ = ["DEFAULT_DATASET", "Dataset", "load"]

DEFAULT_DATASET = "digits"
"""What is certified when nobody names a data set: embedded in scikit-learn."""


_OURS = ("root", "split", "input_size", "preparation")


def load(
    reference: str,
    root: str | Path | None = None,
    split: str = "test",
    input_size: Sequence[int] | None = None,
    preparation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Dataset:
    """Load a data set by name, through the host: built-in ones and those of plugins alike.

    Args:
        reference: ``"mnist"``, or ``"folder:PATH"``: a name, and after a colon what it takes.
        root: directory of the data sets; else the environment variable ``RSPLUGINS_DATA``, else ``./data``.
        split: ``"test"``, ``"train"``, or what the data set calls it.
        input_size: (C, H, W) of the model; images that come in many sizes are resized (short side) and centre-cropped to it.
        preparation: how the model's own configuration says images are brought to that size: ``classifier.preparation``.
        options: what the data set takes besides, such as ``resize=256, crop=224, interpolation="bicubic"`` or
            ``classes=[...]``; ``rsplugins plugins show NAME`` lists them. They win over ``preparation`` and are recorded.

    Returns:
        The data set: raw [0, 1] pixels, stable indices.

    Raises:
        UnknownNameError: nobody registered that name; with a did-you-mean.
        DataNotFoundError: what was looked for, where, and how to get it.
        ParameterError: there is no such split or option.

    Example:
        >>> data = load("digits")
        >>> len(data), data.num_classes, data.input_size
        (360, 10, (1, 8, 8))
    """
    from rsplugins.host import get_host

    name, _, argument = reference.partition(":")
    found = get_host().find("dataset", name)
    factory: Callable[..., Any] = found.load()
    options = check_options(factory, options, f"The data set {name!r}", _OURS, types=False)
    own = {"preparation": preparation} if "preparation" in inspect.signature(factory).parameters else {}
    # Only folder-like sources have something after the colon; the others get their own name.
    dataset = factory(argument or name, root=root, split=split, input_size=input_size, **own, **options)
    if not isinstance(dataset, Dataset):
        raise PluginError(f"The data set {name!r} returned {type(dataset).__name__} instead of rsplugins.data.Dataset.")
    # Class names as a list, wherever their file lies: the options say all that it takes to load the same data again.
    named = {"classes": list(dataset.classes or ())} if options.get("classes") is not None else {}
    dataset.options = {**options, **named}
    return dataset
