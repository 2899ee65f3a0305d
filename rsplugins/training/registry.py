"""From the name of a training hook to the object: built-in ones and those of plugins alike, through the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsplugins.parameters import Settings, read


def make_hook(table: Mapping[str, Any]) -> object:
    """Make a training hook from a ``[[hooks]]`` table.

    Args:
        table: ``name`` and the hook's settings.

    Raises:
        UnknownNameError: nobody registered that name; with a did-you-mean.
        ParameterError: an unknown setting or a wrong value.

    Example:
        >>> make_hook({"name": "gaussian", "sigma": 0.25})
        GaussianAugmentation(sigma=0.25)
    """
    from rsplugins.host import get_host

    settings = dict(table)
    name = settings.pop("name")
    factory = get_host().find("training-hook", name).load()
    if isinstance(factory, type) and issubclass(factory, Settings):
        return read(factory, settings, f"[[hooks]] {name}")
    return factory(**settings)
