"""Read the logs of other programs: the dialects of METHODS.md section 7."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from scipy.special import ndtri_exp

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import ParameterError, RunError, UsageError, did_you_mean
from rsplugins.machine.files import write_whole
from rsplugins.provenance import versions
from rsplugins.rounding import round_down
from rsplugins.runs.manifest import Manifest, Selection, write_manifest
from rsplugins.runs.record import RECORDS, Record, to_lines
from rsplugins.runs.seals import run_seal, seal_record
from rsplugins.runs.tsv import MARK, UNCERTIFIED

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
    rounded_by: float = 0.0
    """By how much the radius may be above what was claimed: half a unit of its last decimal, as programs round."""


@dataclass(frozen=True)
class Log:
    """A log as read.

    Attributes:
        lines: in the order of the file.
        dialect: what was found: the form of the time and of ``correct``, and extra columns.
        contradictions: indices whose ``correct`` is not what label and prediction say.
        sign: what a log that this package wrote says its radii are when they are no certificates: ``"estimate"`` or
            ``"empirical"``; empty otherwise.
    """

    lines: tuple[LogLine, ...]
    dialect: dict[str, Any]
    contradictions: tuple[int, ...]
    sign: str = ""


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
    sign, header = _sign(header, [text for _, text in texts])
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
    return Log(tuple(lines), dialect, contradictions, sign)


def _sign(header: list[str] | None, texts: Sequence[str]) -> tuple[str, list[str] | None]:
    """Return what the log says its radii are when they are no certificates, and the header with their column's usual name."""
    for guarantee, column in UNCERTIFIED.items():
        if header is not None and column in header:
            return str(guarantee), ["radius" if name == column else name for name in header]
    # The sign outlives a header that was cut off.
    return str(Guarantee.ESTIMATE) if any(MARK in text for text in texts) else "", header


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
            _number("radius", radius := values.pop("radius").removeprefix(MARK), least=0.0),
            int(_number("correct", values.pop("correct"))),
            _finite("time", parse_seconds(values.pop("time"))),
            {name: _number(name, value) for name, value in values.items()},
            _rounding(radius),
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


def _rounding(text: str) -> float:
    """Return half a unit of a number's last decimal, which printing it may have added."""
    exponent = Decimal(text).as_tuple().exponent
    return 0.5 * 10.0**exponent if isinstance(exponent, int) else 0.0


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

    Raises:
        ParameterError: the log says that its radii are no certificates, and ``claimed`` that they are.
        RunError: a radius is larger than sigma, n and alpha can give.
    """
    log = read_log(path)
    _check_sign(path, log, claimed)
    limits = [_limit(line, claimed) for line in log.lines]
    _check_limits(path, log, limits, claimed)
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
    seal = run_seal(directory)
    records = [_record(line, limit, claimed.get("n")) for line, limit in zip(log.lines, limits, strict=True)]
    write_whole(directory / RECORDS, "".join(to_lines(seal_record(record, seal) for record in records)))
    return log


def _check_sign(path: Path, log: Log, claimed: dict[str, Any]) -> None:
    if log.sign and Guarantee(claimed["guarantee"]).certifies:
        raise ParameterError(
            f"{path} says that its radii are no certificates ({log.sign}); --guarantee says {claimed['guarantee']}.",
            cause="rsplugins wrote it for a method that estimates, or for an attack",
            fix=f"leave --guarantee out, or use --guarantee {log.sign}",
        )


def _limit(line: LogLine, claimed: dict[str, Any]) -> float:
    r"""Return the largest radius that Gaussian noise can certify for a line, as far as it is known; infinity otherwise.

    With all n samples for one class, a lower bound of its probability with confidence 1 - alpha is at most
    :math:`\alpha^{1/n}` (Clopper and Pearson), so no rule gives more than :math:`\sigma \Phi^{-1}(\alpha^{1/n})` in l2; an linf
    ball lies around the l2 ball of its radius. Other noises, for l1, have other limits.
    """
    sigma, alpha, n = claimed.get("sigma"), claimed.get("alpha"), line.extra.get("samplesize", claimed.get("n"))
    known = claimed["guarantee"] == Guarantee.PROBABILISTIC and claimed["norm"] != Norm.L1
    if not known or not (sigma and alpha and n):
        return math.inf
    return float(sigma) * max(0.0, float(ndtri_exp(math.log(alpha) / n)))


def _check_limits(path: Path, log: Log, limits: Sequence[float], claimed: dict[str, Any]) -> None:
    over = [
        (line, limit)
        for line, limit in zip(log.lines, limits, strict=True)
        if line.predict >= 0 and line.radius - line.rounded_by > limit * (1 + 1e-9)
    ]
    if over:
        line, limit = over[0]
        raise RunError(
            f"{path}: {len(over)} radii are larger than sigma, n and alpha can give: input {line.index} has {line.radius:g}, and "
            f"{round_down(limit, 6)} is the most at sigma={claimed['sigma']:g}, alpha={claimed['alpha']:g}.",
            cause="the log was made with other settings, or its radii are estimates",
            fix="give the settings of its run, or --guarantee estimate",
        )


def _record(line: LogLine, limit: float, n: int | None) -> Record:
    # A radius that printing rounded up past the limit is the limit.
    evidence: dict[str, Any] = {"predict": line.predict, "radius": min(line.radius, limit)}
    if line.extra:
        evidence["extra"] = line.extra
    return Record(line.index, line.label, evidence, int(line.extra.get("samplesize", n or 0)), line.seconds)
