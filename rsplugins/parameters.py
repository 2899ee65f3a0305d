"""What a user may set: checked by pydantic, refused with a :class:`~rsplugins.errors.ParameterError`, written in one grammar.

Certifiers have a pydantic model, training hooks and recipes are :class:`Settings`, sources of models and data are functions with
annotations: one way to check them all, and one way to say what is wrong. No torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

import pydantic.dataclasses
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PydanticUserError, Strict, TypeAdapter, ValidationError

from rsplugins.errors import ParameterError, did_you_mean

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T", bound="Settings")


def number(value: Any) -> Any:
    """Return the number that a text such as ``"8/255"`` or ``"0.5"`` is; anything else as it came.

    Example:
        >>> number("51/255"), number("0.5"), number("8 of 255"), number(3)
        (0.2, 0.5, '8 of 255', 3)
    """
    if not isinstance(value, str):
        return value
    numerator, slash, denominator = value.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(value)
    except (ValueError, ZeroDivisionError):
        return value


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError('a number, or a fraction such as "8/255"')
    return number(value)


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_flag)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_flag)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_flag)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_flag)]
Count = Annotated[int, Field(ge=1), Strict()]
Whole = Annotated[int, Field(ge=0), Strict()]
Flag = Annotated[bool, Strict()]
Eps = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_no_flag)]
"""An l-infinity budget on raw [0, 1] pixels."""
Sigma = Annotated[float, Field(gt=0, le=4, allow_inf_nan=False), BeforeValidator(_no_flag)]
"""A noise level on raw [0, 1] pixels."""


class Settings:
    """Base of dataclasses whose fields pydantic checks: decorate a subclass with :func:`settings`."""

    def __post_init__(self) -> None:
        """End the chain of checks that subclasses make besides."""


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def settings(cls: type[T] | None = None, /, *, frozen: bool = False) -> Any:
    """Make a dataclass of keyword arguments from a subclass of :class:`Settings`; a frozen one is a value, others are objects.

    Its constructor raises a ParameterError that names the field, the value and what is allowed.

    Example:
        >>> @settings(frozen=True)
        ... class Ball(Settings):
        ...     eps: Eps = 0.1
        >>> Ball(eps="8/255")
        Ball(eps=0.03137254901960784)
        >>> Ball(eps=8)
        Traceback (most recent call last):
        ...
        rsplugins.errors.ParameterError: Ball eps is 8; allowed: at most 1, on raw [0, 1] pixels; did you mean 8/255 = 0.03137?
    """

    def make(kind: type[T]) -> type[T]:
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        made: Any = pydantic.dataclasses.dataclass(kind, kw_only=True, eq=frozen, frozen=frozen, config=config)
        check = made.__init__

        def __init__(self: Any, **values: Any) -> None:  # noqa: N807
            try:
                check(self, **values)
            except ValidationError as error:
                raise explained(error, made, made.__name__) from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return make if cls is None else make(cls)


def read(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make settings from a mapping, as a TOML reader returns it.

    Args:
        kind: made by :func:`settings`.
        values: plain values.
        where: how errors name the mapping, such as ``"[[hooks]] gairat"``.

    Raises:
        ParameterError: an unknown key (with a did-you-mean), a missing one, or a wrong value (with what is allowed).
    """
    try:
        # The validator calls no constructor: errors keep their place in nested tables.
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise explained(error, kind, where) from None


def plain(value: Any) -> Any:
    """Return settings as dictionaries, lists and scalars, leaving out fields that are None.

    Example:
        >>> @settings(frozen=True)
        ... class Point(Settings):
        ...     at: tuple[int, ...] = (1, 2)
        ...     name: str | None = None
        >>> plain(Point())
        {'at': [1, 2]}
    """
    if isinstance(value, Settings):
        fields = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
        return {name: plain(getattr(value, name)) for name in fields if getattr(value, name) is not None}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def parse_parameters(model: type[M], values: Mapping[str, Any], method: str) -> M:
    """Validate a certifier's parameters.

    Raises:
        ParameterError: naming the parameter, the value given, and what is allowed; with a did-you-mean for a wrong name.

    Example:
        >>> class Parameters(BaseModel):
        ...     model_config = ConfigDict(extra="forbid")
        ...     sigma: float = 0.25
        >>> parse_parameters(Parameters, {"sgima": 1.0}, "gaussian")
        Traceback (most recent call last):
        ...
        rsplugins.errors.ParameterError: The certifier 'gaussian' has no parameter 'sgima'. Did you mean 'sigma'?
          next step: Use one of: sigma; `rsplugins plugins show gaussian` says more.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise explained(error, model, f"The certifier {method!r}", show=method) from None


def check_options(
    factory: Callable[..., Any], options: Mapping[str, Any], who: str, own: Sequence[str] = (), *, types: bool = True
) -> dict[str, Any]:
    """Return the options of a source, a function whose first argument is the reference, checked by its annotations.

    Args:
        factory: the function; where it takes any keyword, names are not checked, and values where their types are not known.
        options: as the user gave them.
        who: how errors name the source.
        own: its keywords that are no options of the user.
        types: whether values are checked too; sources that say better what is wrong with a value do so themselves.

    Raises:
        ParameterError: an unknown option, or a value of the wrong type.
    """
    taken = list(inspect.signature(factory).parameters.values())[1:]
    known = [each.name for each in taken if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in own]
    if not any(each.kind is each.VAR_KEYWORD for each in taken):
        for name in options:
            if name not in known:
                fix = f"Use: {', '.join(known)}." if known else "Leave the options out."
                raise ParameterError(f"{who} takes no option {name!r}.{_guess(name, known)}", fix=fix)
    if not types:
        return dict(options)
    try:
        hints = typing.get_type_hints(factory, include_extras=True)
    except Exception:  # names that only a type checker knows
        return dict(options)
    return {name: _checked(value, hints[name], name, who) if name in hints else value for name, value in options.items()}


def _checked(value: Any, hint: Any, name: str, who: str) -> Any:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, TypeError):  # a type that pydantic has no schema for, or one with a configuration of its own
        return value
    try:
        read_in = number(value) if float in (hint, *get_args(hint)) else value
        checked = adapter.validate_python(read_in)
        return checked if isinstance(value, str) else value  # a number stays of the kind that it was given as
    except ValidationError as error:
        problem = error.errors()[0]
        raise ParameterError(f"{who}: {name} is {value!r}; allowed: {_allowed(problem)}.") from None


def _guess(name: str, known: Sequence[str]) -> str:
    if name == "pretrained" and "weights" in known:  # timm's word for it
        return " Did you mean 'weights'? It is a name, \"DEFAULT\" by default; None (on a command line null) is random ones."
    return did_you_mean(name, known)


_LABELS = "Leave it out: no certificate depends on it. rsplugins.score(certificates, labels) then says which are right."
_ELSEWHERE = {
    **dict.fromkeys(("labels", "label", "y", "targets"), _LABELS),
    "device": "Move the model, which the images follow: classifier.to(device).",
    "dtype": "How the model is run is no parameter of a method: --dtype, or rsplugins.certify(dtype=...). What bounds are "
    "computed in is called precision.",
}
"""What is looked for among a certifier's parameters and lies elsewhere."""


def where(name: str) -> str:
    """Return where something lies that is looked for among a certifier's parameters; empty when nobody knows."""
    return _ELSEWHERE.get(name, "")


def explained(error: ValidationError, kind: Any, who: str, show: str = "") -> ParameterError:
    """Return the error of a validator in words: what was given, what is allowed, and for a wrong name the right one.

    Args:
        error: of pydantic.
        kind: what was validated.
        who: the first words.
        show: the plugin of which ``rsplugins plugins show`` says more.
    """
    problems = error.errors()
    for problem in problems:
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            return _unknown(problem, kind, who, show)
        raised = (problem.get("ctx") or {}).get("error")
        if isinstance(raised, ParameterError):
            return raised
    missing = [problem for problem in problems if problem["type"] in ("missing", "missing_keyword_only_argument")]
    if missing and not show:
        names = [str(problem["loc"][-1]) for problem in missing]
        said = f"{_place(missing[0]['loc'][:-1], who)} lacks {', '.join(map(repr, names))}."
        return ParameterError(said, fix=f"Add a line: {names[0]} = ...")
    lines = [_line(problem) for problem in problems]
    if show:
        return ParameterError(f"{who} cannot run with these parameters: {'; '.join(lines)}.")
    return ParameterError(f"{_place(problems[0]['loc'][:-1], who)} {'; '.join(lines)}")


def _unknown(problem: Any, kind: Any, who: str, show: str) -> ParameterError:
    *above, name = map(str, problem["loc"])
    known = list(_fields(kind, above))
    noun = "parameter" if show else "key"
    if show and name in _ELSEWHERE:
        return ParameterError(f"{who} has no parameter {name!r}.", fix=_ELSEWHERE[name])
    more = f"; `rsplugins plugins show {show}` says more." if show else "."
    fix = f"Use one of: {', '.join(known)}{more}" if known else "It takes no parameters."
    return ParameterError(f"{_place(above, who)} has no {noun} {name!r}.{did_you_mean(name, known)}", fix=fix)


def _place(above: Sequence[Any], who: str) -> str:
    return f"[{'.'.join(map(str, above))}]" if above and isinstance(above[0], str) else who


def _fields(kind: Any, above: Sequence[str]) -> list[str]:
    """Return the names at a place of nested settings."""
    for name in above:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = hints.get(name)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(getattr(kind, "model_fields", ()))


def _line(problem: Any) -> str:
    place = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    name = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
    name += "".join(f"[{part}]" for part in place if isinstance(part, int))
    if problem["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{name} is missing"
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}; allowed: {_allowed(problem)}{_on_255(name, problem)}"


_WORDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "float_type": 'a number, or a fraction such as "8/255"',
    "float_parsing": 'a number, or a fraction such as "8/255"',
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
    "too_short": "a list of at least {min_length} values",
    "too_long": "a list of at most {max_length} values",
}


def _allowed(problem: Any) -> str:
    """Return what a validator allows, in words."""
    words = _WORDS.get(problem["type"])
    if words is not None:
        said = words.format(**(problem.get("ctx") or {}))
        if problem["type"] == "literal_error":
            close = did_you_mean(str(problem["input"]), re.findall(r"'([^']+)'", said))
            said += f".{close}" if close else ""
        return said
    return str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")


def _on_255(name: str, problem: Any) -> str:
    """Return what to give in place of a value on the scale of pixels from 0 to 255."""
    if name not in ("sigma", "eps") or problem["type"] != "less_than_equal":
        return ""
    given = number(problem["input"])
    return f", on raw [0, 1] pixels; did you mean {given:g}/255 = {float(given) / 255:.4g}?"


def parse_settings(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Read ``key=value`` texts; a value is JSON where it can be, a fraction, or numbers with commas, else the text itself.

    Raises:
        ParameterError: there is no ``=``, or a key comes twice.

    Example:
        >>> parse_settings(["sigma=0.25", "gaussian.n=1000", "kind=soft", "eps=51/255", "size=3,32,32"], "--set")
        {'sigma': 0.25, 'gaussian.n': 1000, 'kind': 'soft', 'eps': 0.2, 'size': [3, 32, 32]}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ParameterError(f"{option} {text!r} is not key=value.", fix=f"write {option} sigma=0.25")
        if key in found:
            raise ParameterError(f"{option} {key}=... is given twice.", fix="give it once")
        # A path may look like a fraction where options name files.
        found[key] = _value(value, alone=option == "--set" or key in ("mean", "std", "crop"))
    return found


def _value(text: str, *, alone: bool) -> Any:
    try:
        return json.loads(text.replace("_", "") if text.replace("_", "").isdigit() else text)
    except ValueError:
        words = {"True": True, "False": False, "None": None}
        return words[text] if text in words else _numbers(text, alone=alone)


def _numbers(text: str, *, alone: bool = True) -> Any:
    """Return the list of numbers that ``"3,32,32"`` is, the number that ``"8/255"`` is, or the text of anything else.

    Example:
        >>> _numbers("3,32,32"), _numbers("0.5,1/2"), _numbers("cat,dog"), _numbers("01,02")
        ([3, 32, 32], [0.5, 0.5], 'cat,dog', '01,02')
    """
    values = [_number(part.strip()) for part in text.split(",")]
    if any(isinstance(value, str) for value in values) or (len(values) == 1 and not alone and "/" in text):
        return text
    return values if len(values) > 1 else values[0]


def _number(text: str) -> float | str:
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        return float(text)
    found: float | str = number(text) if "/" in text else text
    return found
