"""What commands print: warnings as one line, tables for a terminal, JSON for machines."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rsplugins.runs.run import Run

PIPED_WIDTH = 140
WIDTHS = ((4, 128), (3, 118), (2, 107), (1, 96))
"""How many radii a table shows, and the width that this takes; narrower ones show one, and leave counts and abstentions out."""


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr)  # noqa: T201


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=2, default=str))  # noqa: T201


def plain_warnings() -> None:
    """Show warnings of this package as one line on standard error, without a source line."""
    from rsplugins.errors import RspluginsWarning

    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, RspluginsWarning):
            say(f"rsplugins: {message}")
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("always", RspluginsWarning)


def print_runs(runs: Sequence[Run]) -> None:
    """Print one table of runs: certified numbers by norm, then estimates under a heading of their own."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from rsplugins.runs.tables import group_runs, run_names

    width = None if sys.stdout.isatty() else max(PIPED_WIDTH, shutil.get_terminal_size().columns)
    console = Console(width=width, highlight=False)
    radii = next((count for count, needed in WIDTHS if console.width >= needed), 0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("guarantee", min_width=len("probabilistic,"), no_wrap=not sys.stdout.isatty())
    for heading in (*(("inputs", "abstain") if radii else ()), "clean", "accuracy", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for _ in range(radii or 1):
        table.add_column("", justify="right", no_wrap=True)
    labels = dict(zip(map(id, runs), run_names(runs), strict=True))
    for title, members in group_runs(runs).items():
        _add_group(table, title, members, labels, radii)
    console.print(table)
    console.print(
        "accuracy and r=...: percent of all inputs that are right with at least that radius on raw [0, 1] pixels "
        "(of patches, their side in pixels); "
        "clean: the model itself, without noise, on the same inputs; "
        "ACR: average certified radius over all inputs, 0 where wrong or abstained; n and sigma are in the report",
        style="dim",
    )


def _add_group(table: Any, title: str, members: Sequence[Run], labels: dict[int, str], radii: int) -> None:
    from rsplugins.runs.summary import certified_count, summarise
    from rsplugins.runs.tables import (
        CERTIFIED,
        EDITED,
        clean_cell,
        guarantee_label,
        mean_text,
        percent,
        radius_columns,
        radius_label,
    )

    grid = radius_columns(members)[1:]
    shown = radii or 1
    grid = [grid[len(grid) * k // shown] for k in range(shown)] if len(grid) > shown else grid
    certified, edited = title.startswith(CERTIFIED), title.startswith(EDITED)
    # The column beside a heading is free: half of a long one goes there.
    kind, _, rest = title.partition(", ")
    said, comma, norm = rest.rpartition(", ")
    heading = (title, "") if certified or edited else (f"{kind}, {norm}" if comma else kind, said or rest)
    style = "bold red" if edited else "bold green" if certified else "bold yellow"
    mean = "ACR" if certified else "mean r"  # an average of estimates is no average certified radius
    table.add_row(*heading, *[""] * (4 if radii else 2), mean, *[radius_label(radius, members) for radius in grid], style=style)
    for run in members:
        summary = summarise(run)
        total = max(1, summary["inputs"])
        inputs = f"{summary['inputs']}" + (f" ({summary['failed']} failed)" if summary["failed"] else "")
        cells = [labels[id(run)], guarantee_label(run)]
        cells += [inputs, f"{100 * summary['abstention_rate']:.1f}"] if radii else []
        cells += [clean_cell(run), percent(summary["correct"], total), mean_text(run.rows)]
        table.add_row(*cells, *[percent(certified_count(run.rows, radius), total) for radius in grid])
    table.add_section()


def shown_path(path: Path) -> str:
    """Return a path relative to the current directory where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
