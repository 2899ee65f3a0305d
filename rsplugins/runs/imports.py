"""Read the logs of other programs: the dialects of METHODS.md section 7."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import ParameterError, RunError, UsageError, did_you_mean
from rsplugins.runs.files import write_whole
from rsplugins.runs.manifest import Manifest, Selection, versions, write_manifest
from rsplugins.runs.record import RECORDS, Record, to_lines

_COLUMNS = {6: (), 7: ("levels_needed",), 8: ("pA", "samplesize")}
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True)
class LogLine:
    """One line of a log: what every dialect has, and the extra columns by name."""

    index: int
    label: int
    predict: int
    radius: float
    correct: int
    seconds: float
    extra: dict[str, float]


@dataclass(frozen=True)
class Log:
    """A log as read.

    Attributes:
        lines: in the order of the file.
        dialect: what was found: the form of the time and of ``correct``, and extra columns.
        contradictions: indices whose ``correct`` is not what label and prediction say.
    """

    lines: tuple[LogLine, ...]
    dialect: dict[str, Any]
    contradictions: tuple[int, ...]


def parse_seconds(text: str) -> float:
    """Read a duration: H:MM:SS.ffffff, with days where there are, or seconds.

    Example:
        >>> parse_seconds("0:01:02.5"), parse_seconds("62.5"), parse_seconds("1 day, 0:00:01")
        (62.5, 62.5, 86401.0)
    """
    match = _CLOCK.fullmatch(text.strip())
    if not match:
        return float(text)
    days, hours, minutes, seconds = match.groups()
    return int(days or 0) * 86400.0 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_log(path: Path) -> Log:
    """Read a log in any known dialect.

    ``correct`` is read as a running total when its values say so, and checked against label and prediction either way.

    Raises:
        UsageError: there is no such file.
        RunError: a line is in no known dialect, or has a number that is not finite or a negative radius; the text names it.
    """
    try:
        texts = [(number, text) for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if text.strip()]
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not a text file: {error}") from None
    header: list[str] | None = None
    if texts and not _split(texts[0][1])[0].lstrip("-").isdigit():
        header = _split(texts.pop(0)[1])
    lines, clocks = [], set()
    for number, text in texts:
        lines.append(_parse(path, number, _split(text), header))
        clocks.add(":" in text)
    if not lines:
        raise RunError(f"{path} has no lines of results.", fix=f"expected tab-separated: {_expected()}")
    totals, contradictions = _check_correct(lines)
    dialect = {
        "header": header is not None,
        "time": "seconds" if clocks == {False} else "H:MM:SS",
        "correct": "running total" if totals else "0/1",
        "extra_columns": sorted(lines[0].extra),
    }
    return Log(tuple(lines), dialect, contradictions)


def _split(text: str) -> list[str]:
    return [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()


def _expected() -> str:
    return "idx label predict radius correct time, with extra columns pA samplesize, or levels_needed"


def _parse(path: Path, number: int, cells: Sequence[str], header: Sequence[str] | None) -> LogLine:
    try:
        values = _named(cells, header)
        return LogLine(
            int(values.pop("idx")),
            int(values.pop("label")),
            int(values.pop("predict")),
            _number("radius", values.pop("radius"), least=0.0),
            int(_number("correct", values.pop("correct"))),
            _finite("time", parse_seconds(values.pop("time"))),
            {name: _number(name, value) for name, value in values.items()},
        )
    except _ValueRefusedError as error:
        raise RunError(
            f"{path} line {number}: {error}",
            cause="the program that wrote it failed there, or the columns are in another order.",
            fix=f"correct the line, or drop it; an abstention has predict -1 and radius 0. Expected tab-separated: {_expected()}",
        ) from None
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{path} line {number} is in no known dialect: {error}",
            cause=f"expected tab-separated: {_expected()}",
            fix="correct the line",
        ) from None


class _ValueRefusedError(Exception):
    """A number that can be read, and that no claim has."""


def _number(name: str, text: str, least: float = -math.inf) -> float:
    return _finite(name, float(text), least)


def _finite(name: str, value: float, least: float = -math.inf) -> float:
    if not (math.isfinite(value) and value >= least):
        bound = "" if least < 0 else f" of at least {least:g}"
        raise _ValueRefusedError(f"its {name} is {value:g}; expected a finite number{bound}.")
    return value


def _named(cells: Sequence[str], header: Sequence[str] | None) -> dict[str, str]:
    if header is None:
        if len(cells) not in _COLUMNS:
            raise ValueError(f"it has {len(cells)} columns")
        header = ("idx", "label", "predict", "radius", "correct", "time", *_COLUMNS[len(cells)])
    if len(cells) != len(header):
        raise ValueError(f"it has {len(cells)} columns, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _check_correct(lines: Sequence[LogLine]) -> tuple[bool, tuple[int, ...]]:
    own = [int(line.predict == line.label) for line in lines]
    written = [line.correct for line in lines]
    is_total = max(written) > 1 or (written != own and written == _running(own))
    said = [now - before for before, now in zip([0, *written], written, strict=False)] if is_total else written
    return is_total, tuple(line.index for line, here, there in zip(lines, own, said, strict=True) if here != there)


def _running(values: Sequence[int]) -> list[int]:
    total, sums = 0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def claimed_parameters(*, guarantee: str, norm: str, alpha: float | None, sigma: float | None, n: int | None) -> dict[str, Any]:
    """Return, checked, what the user says about a log.

    Raises:
        ParameterError: a value that is not allowed, or a probabilistic claim without its alpha.
    """
    for name, value, known in (("guarantee", guarantee, Guarantee), ("norm", norm, Norm)):
        if value not in [str(member) for member in known]:
            raise ParameterError(
                f"--{name} is {value!r}; allowed: {', '.join(map(str, known))}.{did_you_mean(value, map(str, known))}"
            )
    if guarantee == Guarantee.PROBABILISTIC and alpha is None:
        raise ParameterError(
            "A probabilistic log needs its --alpha.", fix="Cohen et al. used --alpha 0.001; say what the log's run used"
        )
    if alpha is not None and not 0 < alpha < 1:
        raise ParameterError(f"--alpha is {alpha:g}; allowed: above 0 and below 1.")
    return {"guarantee": guarantee, "norm": norm, "alpha": alpha, "sigma": sigma, "n": n}


def import_log(path: Path, directory: Path, *, method: str, claimed: dict[str, Any], model: str = "", data: str = "") -> Log:
    """Make a run directory of another program's log.

    Args:
        path: the log.
        directory: the run directory to write; it must not hold another run.
        method: what to call the method in tables.
        claimed: what the log does not say: guarantee, norm, alpha, and sigma and n where there are.
        model: a reference, for tables.
        data: a reference, for tables.

    Returns:
        The log as read. The directory has no evidence: its claims are repeated, and ``verify`` says so.
    """
    log = read_log(path)
    manifest = Manifest(
        method=method,
        parameters=claimed,
        model={"reference": model} if model else {},
        data={"reference": data} if data else {},
        selection=Selection.of([line.index for line in log.lines]),
        versions=versions(),
        imported={"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "dialect": log.dialect},
    )
    write_manifest(directory, manifest)
    records = [_record(line, claimed.get("n")) for line in log.lines]
    write_whole(directory / RECORDS, "".join(to_lines(records)))
    return log


def _record(line: LogLine, n: int | None) -> Record:
    evidence: dict[str, Any] = {"predict": line.predict, "radius": line.radius}
    if line.extra:
        evidence["extra"] = line.extra
    return Record(line.index, line.label, evidence, int(line.extra.get("samplesize", n or 0)), line.seconds)
