"""From what ``rsplugins plugins check`` was asked for to the checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsplugins.errors import ParameterError, UnknownNameError, UsageError
from rsplugins.host import Status, get_host
from rsplugins.testing.certifiers import certifier_checks
from rsplugins.testing.hooks import training_hook_checks
from rsplugins.testing.outcome import Check
from rsplugins.testing.sources import model_source_checks

KINDS = ("certifier", "training-hook", "model-source")
ABOUT = ("classifier", "smoothed", "own")


def checks_for(
    kind: str, name: str, settings: Mapping[str, Any], *, reference: str = "", about: Any = None, thorough: bool = False
) -> list[Check]:
    """Return the checks of a plugin by kind and name.

    Raises:
        UnknownNameError: no such kind or plugin; with a did-you-mean.
        PluginUnavailableError, PluginError: it cannot be used here.
        UsageError, ParameterError: something needed is missing.
    """
    if kind not in KINDS:
        raise UnknownNameError("contract for plugins of the kind", kind, KINDS)
    if about is not None and about not in ABOUT:
        raise ParameterError(f"--about is {about!r}; allowed: {', '.join(ABOUT)}.")
    entry = get_host().find(kind, name)
    if entry.status is not Status.ACTIVE:
        raise entry.error()
    if kind == "certifier":
        return certifier_checks(name, about=about, thorough=thorough, **settings)
    if kind == "training-hook":
        return training_hook_checks(name, **settings)
    if not reference:
        raise UsageError("A model source is checked with one of its models.", fix="Add --reference NAME.")
    return model_source_checks(name, reference, **settings)
