"""Strict settings from plain mappings: frozen or plain dataclasses whose fields are checked by their type hints.

One path validates a recipe read from TOML and an object built in Python: :class:`Settings` coerces and checks every field after
``__init__``. No dependency beyond the standard library, so that training runs on a machine that has torch and little else.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from rsplugins.errors import ParameterError, did_you_mean

T = TypeVar("T", bound="Settings")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as metadata of ``Annotated``.

    Attributes:
        low: the smallest allowed value, or the largest refused one when ``open_low``.
        high: the largest allowed value.
        open_low: whether ``low`` itself is refused.
        fix: the next step for a value outside; a likely mistake and how to write what was meant.
        finite: whether infinity is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    fix: str = ""
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low and self.low > -math.inf else value >= self.low
        return above and value <= self.high and not math.isnan(value) and not (self.finite and math.isinf(value))

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = "" if self.high == math.inf else f"at most {self.high:g}"
        return " and ".join(part for part in (low, high) if part) or ("a finite number" if self.finite else "a number")


Positive = Annotated[float, Range(0.0, open_low=True)]
NonNegative = Annotated[float, Range(0.0)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Eps = Annotated[
    float,
    Range(
        0.0,
        1.0,
        open_low=True,
        fix='Images are raw [0, 1] pixels: a budget of 8 grey levels of 255 is written "8/255" or 0.0314.',
    ),
]
"""An l-infinity budget on raw [0, 1] pixels."""
Sigma = Annotated[
    float,
    Range(0.0, 4.0, open_low=True, fix="sigma is in raw [0, 1] pixels, such as 0.25; divide a value in 0 to 255 units by 255."),
]
"""A noise level on raw [0, 1] pixels."""


class Settings:
    """Base of dataclasses whose fields are coerced and checked by their annotations.

    Understood annotations: bool, int, float (also from text such as ``"8/255"``), str, Literal, ``X | None``, tuples,
    dictionaries, other Settings, and ``Annotated`` with a :class:`Range`.

    Raises:
        ParameterError: naming the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        where = getattr(self, "WHERE", type(self).__name__)
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _coerce(getattr(self, name), hint, f"{where}.{name}"))


def read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make settings from a mapping, refusing unknown and missing keys.

    Args:
        cls: a dataclass derived from :class:`Settings`.
        values: plain values, as a TOML reader returns them.
        where: how errors name the mapping, such as ``"[optimizer]"``.

    Raises:
        ParameterError: an unknown key (with a did-you-mean), a missing one, or a wrong value (with the allowed ones).

    Example:
        >>> @dataclass(frozen=True)
        ... class Ball(Settings):
        ...     eps: Eps = 0.1
        >>> read(Ball, {"eps": "8/255"}, "[ball]").eps
        0.03137254901960784
        >>> read(Ball, {"epz": 0.3}, "[ball]")
        Traceback (most recent call last):
        ...
        rsplugins.errors.ParameterError: [ball] has no key 'epz'. Did you mean 'eps'?
          next step: Use one of: eps.
    """
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ParameterError(f"{where} has no key {key!r}.{did_you_mean(key, known)}", fix=f"Use one of: {', '.join(known)}.")
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ParameterError(f"{where} lacks {', '.join(repr(name) for name in missing)}.", fix=f"Add a line: {missing[0]} = ...")
    hints = _hints(cls)
    return cls(**{key: _coerce(value, hints[key], f"{where} {key}") for key, value in values.items()})


def plain(settings: Any) -> Any:
    """Return settings as dictionaries, lists and scalars, leaving out fields that are None.

    Example:
        >>> @dataclass(frozen=True)
        ... class Point(Settings):
        ...     at: tuple[int, ...] = (1, 2)
        ...     name: str | None = None
        >>> plain(Point())
        {'at': [1, 2]}
    """
    if isinstance(settings, Settings):
        fields = [field.name for field in dataclasses.fields(settings) if field.init]  # type: ignore[arg-type]
        return {name: plain(getattr(settings, name)) for name in fields if getattr(settings, name) is not None}
    if isinstance(settings, Mapping):
        return {str(key): plain(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [plain(value) for value in settings]
    return settings


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _refuse(where: str, value: Any, allowed: str, fix: str = "") -> ParameterError:
    return ParameterError(f"{where} is {value!r}; it must be {allowed}.", fix=fix)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_range(_coerce(value, arguments[0], where), arguments[1], where)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _coerce(value, inner[0], where)
    if origin is Literal:
        return _literal(value, arguments, where)
    if origin is tuple:
        return _tuple(value, arguments, where)
    if isinstance(hint, type) and issubclass(hint, Settings):
        return _settings(value, hint, where)
    return _scalar(value, hint if origin is None else origin, where)


def _in_range(value: Any, bounds: Range, where: str) -> Any:
    if value not in bounds:
        raise _refuse(where, value, str(bounds), bounds.fix)
    return value


def _literal(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        close = did_you_mean(str(value), [str(choice) for choice in allowed])
        raise ParameterError(f"{where} is {value!r}.{close}", fix=f"Use one of: {', '.join(repr(choice) for choice in allowed)}.")
    return value


def _tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _refuse(where, value, "a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_coerce(item, arguments[0], f"{where}[{position}]") for position, item in enumerate(value))
    if len(value) != len(arguments):
        raise _refuse(where, value, f"a list of {len(arguments)} values")
    pairs = zip(value, arguments, strict=True)
    return tuple(_coerce(item, inner, f"{where}[{position}]") for position, (item, inner) in enumerate(pairs))


def _settings(value: Any, cls: type[Settings], where: str) -> Settings:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _refuse(where, value, "a table")
    return read(cls, value, where)


def _scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is float:
        return _float(value, where)
    if kind is Any:
        return value
    is_right = isinstance(value, Mapping if kind is dict else kind) and not (kind is int and isinstance(value, bool))
    if not is_right:
        names = {int: "a whole number", bool: "true or false", str: "text", dict: "a table"}
        raise _refuse(where, value, names.get(kind, str(kind)))
    return value


def number(text: str) -> float:
    """Read a number or a fraction such as ``"8/255"``.

    Raises:
        ValueError, ZeroDivisionError: it is neither.
    """
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _float(value: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            return number(value)
        except (ValueError, ZeroDivisionError):
            raise _refuse(where, value, 'a number, or a fraction such as "8/255"') from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refuse(where, value, 'a number, or a fraction such as "8/255"')
    return float(value)
