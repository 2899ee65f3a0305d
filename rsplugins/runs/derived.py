"""Write what is derived from the records: ``results.tsv``, ``summary.json``, ``curve.png``, ``report.html``."""

from __future__ import annotations

import json
from typing import Any

from rsplugins.machine.files import write_whole
from rsplugins.runs.run import Run
from rsplugins.runs.seals import DERIVED
from rsplugins.runs.summary import summarise
from rsplugins.runs.tsv import to_tsv

RESULTS, SUMMARY, CURVE, REPORT = DERIVED


def write_numbers(run: Run) -> dict[str, Any]:
    """Write ``results.tsv`` and ``summary.json``; return the summary."""
    summary = summarise(run)
    write_whole(run.directory / RESULTS, to_tsv(run.rows))
    write_whole(run.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def write_pages(run: Run) -> None:
    """Write ``curve.png`` and ``report.html``; imports matplotlib."""
    from rsplugins.runs.plots import curve_figure, png
    from rsplugins.runs.report import to_html

    write_whole(run.directory / CURVE, png(curve_figure([run])))
    write_whole(run.directory / REPORT, to_html([run]))
