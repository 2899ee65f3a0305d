"""Which certificates may be added up, and which numbers are labels; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rsplugins.certificate import BESIDE, Certificate
from rsplugins.errors import ParameterError

_FUNCTION = ("dtype", "compile", "sound", "noise", "split", "representation", "arithmetic")
"""What, besides the weights, makes two certificates ones of two functions; not the device, and not what was computed of it."""
_EFFORT = ("n", "n0", "n_min", "alpha", "stop_at", "tolerance", "eps", "max_eps", "memory_gib")
"""Parameters that change how much is known of a function, not which one it is."""


def check_together(certificates: Sequence[Certificate]) -> None:
    """Check that the radii of certificates may stand in one sum.

    Raises:
        ParameterError: naming the two that do not go together, by their places.
    """
    for place, one in enumerate(certificates):
        if not isinstance(one, Certificate):
            raise ParameterError(
                f"Entry {place} is a {type(one).__name__}, no certificate.", fix="Pass what rsplugins.certify returned."
            )
    kinds = sorted({f"{one.method} ({one.norm})" for one in certificates})
    if len(kinds) > 1:
        raise ParameterError(f"The certificates are of several kinds: {', '.join(kinds)}.", fix="Score each method by itself.")
    made = [(place, one) for place, one in enumerate(certificates) if one.error is None]
    claims = [(place, one) for place, one in made if one.prediction is not None]
    _alike(made, "guarantees", lambda one: str(one.guarantee))
    _alike(made, "models", lambda one: one.function.get("sha256"))
    for key in _FUNCTION:
        _alike(made, f"functions ({key})", lambda one, key=key: one.function.get(key))  # type: ignore[misc]
    for key in sorted({key for _, one in made for key in one.parameters} - {*_EFFORT}):
        _alike(made, f"settings ({key})", lambda one, key=key: repr(one.parameters.get(key)))  # type: ignore[misc]
    _alike(made, "spaces", lambda one: one.space)
    # An abstention claims nothing, under no assumption.
    _alike(claims, "assumptions", _assumed)
    seen: dict[int, int] = {}
    for place, one in enumerate(certificates):
        first = seen.setdefault(one.index, place)
        if first != place:
            raise ParameterError(
                f"Certificates {first} and {place} are both of input {one.index}: it would count twice.",
                cause="one list was added twice, or two batches were certified with the default indices, each from 0.",
                fix="Leave one out, or give certify(indices=...) those of the data set, so that each input has its own.",
            )


def _assumed(one: Certificate) -> str:
    return "; ".join(sorted({text for text in one.assumptions if not text.startswith(BESIDE)})) or "none"


def _alike(certificates: Sequence[tuple[int, Certificate]], what: str, value: Callable[[Certificate], Any]) -> None:
    for place, one in certificates[1:]:
        here, there = value(certificates[0][1]), value(one)
        if here != there:
            raise ParameterError(
                f"The certificates have different {what}: {_short(here)} at {certificates[0][0]}, {_short(there)} at {place}.",
                cause="they are of two calls that certify different things; the sum of their radii would be of neither.",
                fix="Score each by itself.",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def read_labels(labels: Iterable[Any], certificates: Sequence[Certificate]) -> list[int]:
    """Return the true classes as numbers, one for each certificate.

    Raises:
        ParameterError: another number of labels; or one that is NaN, no whole number, negative, a list (one-hot, say), or not
            among the model's classes; naming its place.
    """
    found = list(labels)
    if len(found) != len(certificates):
        raise ParameterError(f"There are {len(found)} labels for {len(certificates)} certificates; give one for each.")
    return [_label(value, place, _classes(one)) for place, (value, one) in enumerate(zip(found, certificates, strict=True))]


def _classes(one: Certificate) -> int | None:
    """Return how many classes there are, where a certificate says it."""
    logits = one.evidence.get("logits")
    counted = logits.get("classes") if isinstance(logits, Mapping) else len(logits) if isinstance(logits, list) else None
    known = (one.function.get("num_classes"), one.evidence.get("classes"), counted)
    return next((count for count in known if isinstance(count, int)), None)


def _label(value: Any, place: int, classes: int | None) -> int:
    shape = tuple(getattr(value, "shape", ()))
    if shape or isinstance(value, (list, tuple)):
        raise ParameterError(
            f"Label {place} is not one number but {shape or len(value)}: {_short(value)}.",
            cause="one-hot or soft labels, or a column of shape (N, 1).",
            fix="Give the classes' numbers, of shape (N,): labels.argmax(1) for one-hot ones, labels.flatten() for a column.",
        )
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, (int, float)) or not math.isfinite(number) or number != int(number):
        raise ParameterError(
            f"Label {place} is {_short(value)}, which is no class.",
            cause="labels that are missing, names in place of numbers, or targets of a regression.",
            fix="Give whole numbers from 0.",
        )
    if number < 0 or (classes is not None and number >= classes):
        allowed = f"from 0 to {classes - 1}" if classes is not None else "from 0"
        raise ParameterError(
            f"Label {place} is {int(number)}; the model's classes go {allowed}.",
            cause="labels that begin at 1, a mark for unknown ones, or a data set with other classes than the model's.",
            fix="Bring labels and model to the same classes, and leave unlabelled inputs out.",
        )
    return int(number)
