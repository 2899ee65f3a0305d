"""``results.tsv``: the record that the field already reads (METHODS.md section 7), written in its original form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import ROUND_FLOOR, Decimal

from rsplugins.runs.scoring import Row

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def round_down(value: float, digits: int = 6) -> str:
    """Print a radius with a fixed number of digits after the point, never above the value.

    Example:
        >>> round_down(0.9999999), round_down(0.3, 6), round_down(1.0, 3)
        ('0.999999', '0.299999', '1.000')

    The double nearest to 0.3 lies below 0.3, so 0.3 is not printed.
    """
    if math.isinf(value):
        return "inf"
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


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


def line(row: Row) -> str:
    """Return the line of one input, without the line end; -1 stands for an abstention or a failed input."""
    predict = -1 if row.prediction is None else row.prediction
    fields = (row.index, row.record.label, predict, round_down(row.radius), int(row.correct), format_time(row.record.seconds))
    return "\t".join(map(str, fields))


def to_tsv(rows: Iterable[Row]) -> str:
    """Return the whole file."""
    return "".join(f"{text}\n" for text in (HEADER, *map(line, rows)))
