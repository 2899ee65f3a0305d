"""From what ``rsplugins plugins check`` was asked for to the checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsplugins.errors import ParameterError, UnknownNameError, UsageError
from rsplugins.host import Entry, Status, get_host
from rsplugins.testing.certifiers import certifier_checks
from rsplugins.testing.datasets import dataset_checks
from rsplugins.testing.denoisers import denoiser_checks
from rsplugins.testing.hooks import training_hook_checks
from rsplugins.testing.outcome import Check
from rsplugins.testing.sources import model_source_checks

KINDS = ("certifier", "training-hook", "model-source", "denoiser", "dataset", "bound-operator", "moment-rule")
ABOUT = ("classifier", "smoothed", "own")


def checks_for(
    kind: str | None, name: str, settings: Mapping[str, Any], *, reference: str = "", about: Any = None, thorough: bool = False
) -> list[Check]:
    """Return the checks of a plugin by kind and name.

    Args:
        kind: one of :data:`KINDS`; None where the name says it.
        name: what the plugin brings.
        settings: parameters, settings or options.
        reference: of a model source, denoiser, data set, bound operator or moment rule.
        about: see :func:`rsplugins.testing.certifier_checks`.
        thorough: many more images, boxes or samples.

    Raises:
        UnknownNameError: no such kind or plugin; with a did-you-mean.
        PluginUnavailableError, PluginError: it cannot be used here.
        UsageError, ParameterError: something needed is missing.
    """
    if about is not None and about not in ABOUT:
        raise ParameterError(f"--about is {about!r}; allowed: {', '.join(ABOUT)}.")
    kind = kind or _kind_of(name)
    if kind not in KINDS:
        raise UnknownNameError("contract for plugins of the kind", kind, KINDS)
    entry = get_host().find(kind, name)
    if entry.status is not Status.ACTIVE:
        raise entry.error()
    if kind == "certifier":
        return certifier_checks(name, about=about, thorough=thorough, **settings)
    if kind == "training-hook":
        return training_hook_checks(name, **settings)
    if kind == "dataset":
        return dataset_checks(name, reference=reference, **settings)
    if kind in ("bound-operator", "moment-rule"):
        if settings:
            raise UsageError(f"A {kind} has nothing to set.", fix="Leave --set out.")
        make = bound_operator_checks if kind == "bound-operator" else moment_rule_checks
        return make(name, reference=reference, thorough=thorough)
    return _source_checks(kind, name, reference, settings)


def _source_checks(kind: str, name: str, reference: str, settings: Mapping[str, Any]) -> list[Check]:
    what = "denoiser" if kind == "denoiser" else "model"
    if not reference:
        raise UsageError(f"A source of {what}s is checked with one of its {what}s.", fix="Add --reference NAME.")
    return (denoiser_checks if kind == "denoiser" else model_source_checks)(name, reference, **settings)


def bound_operator_checks(operator: str | Entry, *, reference: str = "", thorough: bool = False) -> list[Check]:
    """See :func:`rsplugins.testing.operators.bound_operator_checks`, which needs auto-LiRPA."""
    from rsplugins.testing import operators

    return operators.bound_operator_checks(operator, reference=reference, thorough=thorough)


def moment_rule_checks(rule: str | Entry, *, reference: str = "", thorough: bool = False) -> list[Check]:
    """See :func:`rsplugins.testing.moments.moment_rule_checks`, which needs auto-LiRPA."""
    from rsplugins.testing import moments

    return moments.moment_rule_checks(rule, reference=reference, thorough=thorough)


def _kind_of(name: str) -> str:
    """Return the kind of what a name is given to; a certifier where it is given to one, and to nothing else first."""
    entries = [entry for entry in get_host().entries() if entry.kind in KINDS]
    kinds = [entry.kind for entry in entries if entry.name == name]
    if not kinds:
        raise UnknownNameError("plugin", name, {entry.name for entry in entries})
    if len(set(kinds)) > 1 and "certifier" not in kinds:
        raise UsageError(f"Several kinds of plugin are called {name!r}: {', '.join(sorted(set(kinds)))}.", fix="Add --kind KIND.")
    return min(kinds, key=KINDS.index)
