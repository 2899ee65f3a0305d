"""``results.tsv``: the record that the field already reads (METHODS.md section 7), written in its original form.

Radii are printed as they were claimed: the shortest decimal that reads back as the claim, with at least six decimals, so that a
script which counts at 0.3, or at 8/255, counts what was certified there.

Estimates bear a sign that the field's scripts trip over: the column is headed ``estimate_radius`` (for attacks ``empirical_...``)
in place of ``radius``, and a ``~`` stands before each number. A script that looks for ``radius``, or reads the fourth column as a
number, stops; :mod:`rsplugins.runs.imports` reads the sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_FLOOR, Decimal

from rsplugins.certificate import Guarantee
from rsplugins.rounding import exactly
from rsplugins.rounding import round_down as round_down
from rsplugins.runs.rows import Row
from rsplugins.runs.summary import weakest

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
MARK = "~"
UNCERTIFIED = {guarantee: f"{guarantee}_radius" for guarantee in Guarantee if not guarantee.certifies}
"""What heads the column of radii that are no certificates."""


def format_time(seconds: float) -> str:
    """Print a duration as the scripts of Cohen et al. do: H:MM:SS.ffffff.

    Example:
        >>> format_time(3723.5)
        '1:02:03.500000'
    """
    micros = round(seconds * 1e6)
    minutes, micros = divmod(micros, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{micros // 1_000_000:02d}.{micros % 1_000_000:06d}"


def header(rows: Iterable[Row]) -> str:
    """Return the first line: what its fourth column is called says whether the radii are certified."""
    guarantee = weakest(rows)
    return HEADER if guarantee is None or guarantee.certifies else HEADER.replace("radius", UNCERTIFIED[guarantee])


def mark(rows: Iterable[Row]) -> str:
    """Return what stands before the radii of a run: nothing, or the sign that they are no certificates."""
    guarantee = weakest(rows)
    return "" if guarantee is None or guarantee.certifies else MARK


def line(row: Row, sign: str = "") -> str:
    """Return the line of one input, without the line end; -1 stands for an abstention or a failed input.

    Args:
        row: of the input.
        sign: what :func:`mark` says of the run.
    """
    return _line(row, sign + exactly(row.radius))


def outdated_line(row: Row) -> str:
    """Return the line as releases before the seals wrote it, 0.3 as 0.299999; their runs still verify."""
    down = Decimal(row.radius).quantize(Decimal("1e-6"), rounding=ROUND_FLOOR) if math.isfinite(row.radius) else "inf"
    return _line(row, str(down))


def _line(row: Row, radius: str) -> str:
    predict = -1 if row.prediction is None else row.prediction
    return "\t".join(map(str, (row.index, row.record.label, predict, radius, int(row.correct), format_time(row.record.seconds))))


def to_tsv(rows: Sequence[Row]) -> str:
    """Return the whole file."""
    sign = mark(rows)
    return "".join(f"{text}\n" for text in (header(rows), *(line(row, sign) for row in rows)))
