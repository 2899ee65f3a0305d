"""What the user may set of a plugin: names, types, ranges, defaults and meanings, read from the code that checks them.

A meaning is the ``description`` of a pydantic field, or the entry in the docstring's ``Attributes:`` or ``Args:``.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rsplugins.host.entries import Entry, guard

_LOADED = ("root", "split", "input_size", "preparation")
"""What ``rsplugins.data.load`` hands to a data set by itself."""
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Parameter:
    """One thing that can be set.

    Attributes:
        name: as it is written.
        type: in words; the choices where there are a few.
        range: what a number may be, in words; empty when it may be any.
        default: as a plain value; None too when it is required.
        required: whether it has to be given.
        meaning: one line; empty when its authors wrote none.
    """

    name: str
    type: str
    range: str
    default: Any
    required: bool
    meaning: str


def parameters(entry: Entry) -> list[Parameter]:
    """Return what can be set of a certifier, a training hook, a model source or a data set; of other kinds nothing can.

    Raises:
        PluginUnavailableError, PluginError: its factory cannot be imported, or is not what its kind asks for.
    """
    if entry.kind not in ("certifier", "training-hook", "model-source", "dataset"):
        return []
    factory = entry.load()
    with guard(entry, "while its parameters were read"):
        if entry.kind == "certifier":
            return _of_model(factory.Parameters)
        if dataclasses.is_dataclass(factory) and isinstance(factory, type):
            return _of_dataclass(factory)
        found = _of_call(factory, skip=entry.kind in ("model-source", "dataset"))
        return [each for each in found if each.name not in _LOADED] if entry.kind == "dataset" else found


def _of_model(model: Any) -> list[Parameter]:
    said = _documented(model)
    found = []
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        limits = [*_ranges(field.annotation), *_limits(field.metadata)]
        meaning = field.description or said.get(name, "")
        found.append(_parameter(name, field.annotation, limits, default, field.is_required(), meaning))
    return found


def _of_dataclass(cls: type) -> list[Parameter]:
    said, hints, found = _documented(cls), typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        missing = default is dataclasses.MISSING
        limits, value = [*_ranges(hints[field.name])], None if missing else default
        found.append(_parameter(field.name, hints[field.name], limits, value, missing, said.get(field.name, "")))
    return found


def _of_call(factory: Any, *, skip: bool) -> list[Parameter]:
    said, found = _documented(factory), []
    for each in list(inspect.signature(factory).parameters.values())[int(skip) :]:
        missing, free = each.default is each.empty, each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        hint = "" if each.annotation is each.empty else each.annotation
        value = None if missing else each.default
        name = f"**{each.name}" if free else each.name
        found.append(_parameter(name, hint, [], value, missing and not free, said.get(each.name, "")))
    return found


def _parameter(name: str, hint: Any, limits: list[str], default: Any, required: bool, meaning: str) -> Parameter:
    return Parameter(name, _words(hint), " and ".join(limits), _value(default), required, _plain(meaning))


def _value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return [_value(each) for each in value] if isinstance(value, tuple | list) else value


def _words(hint: Any) -> str:
    """Return a type in words.

    Example:
        >>> _words(float | None), _words(Literal["auto", "full"]), _words(tuple[float, ...])
        ('float | none', 'auto | full', 'list of float')
    """
    origin, inside = get_origin(hint), get_args(hint)
    if isinstance(hint, str):
        return hint
    if origin is Annotated:
        return _words(inside[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_words, inside))
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (tuple, list) and inside:
        same = origin is list or inside[-1] is Ellipsis
        return f"list of {_words(inside[0])}" if same else f"[{', '.join(map(_words, inside))}]"
    if hint is type(None):
        return "none"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    return hint.__name__ if isinstance(hint, type) else inspect.formatannotation(hint)


def _ranges(hint: Any) -> Iterator[str]:
    """Yield the bounds of a number, or of a number that may be none; those of a list's items say too little alone."""
    if get_origin(hint) is Annotated:
        yield from _limits(get_args(hint)[1:])
    elif get_origin(hint) in (Union, types.UnionType):
        for inside in get_args(hint):
            yield from _ranges(inside)


def _limits(metadata: Any) -> Iterator[str]:
    for each in metadata:
        bounds = [f"{word} {getattr(each, key):g}" for key, word in _LIMITS.items() if getattr(each, key, None) is not None]
        yield from bounds or _limits(getattr(each, "metadata", ()))


def _documented(thing: Any) -> dict[str, str]:
    """Return what the docstrings of a class and its bases, or of a function, say of each parameter."""
    said: dict[str, str] = {}
    for each in reversed(thing.__mro__) if isinstance(thing, type) else [thing]:
        text = inspect.cleandoc(each.__doc__ or "")
        for section in re.findall(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", text, re.M):
            for name, meaning in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
                said[name] = meaning
    return said


def _plain(meaning: str) -> str:
    """Return a docstring's words in one line, without its markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(meaning.split()))
    return text.replace("``", "").rstrip(".")
