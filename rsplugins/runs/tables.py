"""Tables of runs: certified numbers by norm, and estimates in tables of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rsplugins.certificate import CLIPPED, Norm, Threat
from rsplugins.rounding import round_down
from rsplugins.runs.rows import Row
from rsplugins.runs.run import Run
from rsplugins.runs.summary import average_radius, certified_count, radius_grid, summarise

CERTIFIED, ESTIMATES, ATTACKED = "Certified", "Estimates, not certificates", "Under attack, not certificates"
PREDICTED = "Predictions, without a guarantee"
EDITED = "NOT VERIFIED, edited after it was written"
"""What heads the numbers of a run that does not verify, whatever they claim to be."""
_TITLES = {"estimate": ESTIMATES, "empirical": ATTACKED, "none": PREDICTED}
_ORDER = (CERTIFIED, ESTIMATES, ATTACKED, PREDICTED, EDITED)
_COUNTED = {
    CERTIFIED: "with at least that certified radius",
    ATTACKED: "after attacks within that radius (no certificates)",
    PREDICTED: "by the model as it is",
}
"""What a column of a radius counts; others count at the estimated radius."""


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first ``text_columns`` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 0
    note: str = ""

    def to_markdown(self) -> str:
        """Return the table in markdown."""
        rule = ["---" if column < self.text_columns else "---:" for column in range(len(self.header))]
        lines = [" | ".join(cells) for cells in (self.header, tuple(rule), *self.rows)]
        body = "\n".join(f"| {text} |" for text in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def to_latex(self) -> str:
        """Return the table in LaTeX, for the booktabs package."""
        columns = "l" * self.text_columns + "r" * (len(self.header) - self.text_columns)
        lines = [" & ".join(map(_escape, cells)) + r" \\" for cells in (self.header, *self.rows)]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        caption = _escape(f"{self.title}. {self.note}".strip())
        return (
            "\\begin{table}\n\\centering\n"
            f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\\caption{{{caption}}}\n\\end{{table}}\n"
        )


def _escape(text: str) -> str:
    table = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(table.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by what may stand in one table: certified numbers of one norm, estimates of one norm, runs that do not verify.

    Returns:
        The table's title and its runs; certified numbers first.
    """
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        summary = summarise(run)
        title = EDITED if run.problems else CERTIFIED if summary["certifies"] else _TITLES.get(summary["guarantee"], ESTIMATES)
        where = "" if title == PREDICTED else f", {_threat_text(summary['norm'])}"
        groups.setdefault((_ORDER.index(title), title + where), []).append(run)
    return {title: members for (_, title), members in sorted(groups.items(), key=lambda item: item[0])}


def guarantee_label(run: Run) -> str:
    """Return a run's guarantee in words, with its alpha, and whether it is another program's claim."""
    summary = summarise(run)
    if summary["guarantee"] is None:
        return "none: every input failed" if summary["inputs"] else "none: no input yet"
    if run.problems:
        return f"NOT VERIFIED: {run.problems[0]}"
    label = str(summary["guarantee"]) + (", imported claim" if summary["imported"] else "")
    if summary["dataset_alpha"] is not None:
        return f"{label}, alpha={summary['dataset_alpha']:g} over all inputs"
    return label if summary["alpha"] is None else f"{label}, alpha={summary['alpha']:g}"


def result_tables(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Table]:
    """Return the tables of a report, one for each norm and each side of the line between certificates and estimates.

    Args:
        runs: the runs.
        names: what to call them; by default the method's name, with the directory's where that is ambiguous.
    """
    labels = dict(zip(map(id, runs), names or run_names(runs), strict=True))
    tables = []
    for title, members in group_runs(runs).items():
        grid = radius_columns(members)
        certified = title.startswith(CERTIFIED)
        mean = "ACR" if certified else "mean r"  # an average of estimates is no average certified radius
        fixed = ("method", "guarantee", "n", "sigma", "inputs", "failed", "abstain", "clean accuracy", "accuracy", mean)
        header = (*fixed, *(radius_label(radius, members) for radius in grid))
        rows = tuple((labels[id(run)], *_cells(run, grid)) for run in members)
        what = next(
            (text for kind, text in _COUNTED.items() if title.startswith(kind)), "at the estimated radius (no certificates)"
        )
        patches = summarise(members[0])["norm"] == str(Threat.PATCH)
        units = "in pixels of the patch's side" if patches else "on raw [0, 1] pixels"
        note = (
            f"Columns r: the percentage of all inputs that are classified correctly {what}, {units}. "
            f"{mean}: the average radius over all inputs, 0 where wrong, abstained or failed. "
            "clean accuracy: of the model without noise, on the same inputs. Printed numbers are rounded down."
        )
        cut = [labels[id(run)] for run in members if CLIPPED in summarise(run)["assumptions"]]
        note += f" {', '.join(cut)}: {CLIPPED}." if cut else ""
        note = " ".join([note, *sorted({doubt for run in members if (doubt := summarise(run).get("doubt"))})])
        tables.append(Table(title, header, rows, text_columns=2, note=note))
    return tables


def radius_columns(runs: Sequence[Run]) -> list[float]:
    """Return the radii of a table's columns for runs of one norm.

    Where every run verified one radius (its ``eps``), these alone; where small linf radii were searched for, steps of grey levels
    of 255, in which the field states them; otherwise those of :func:`~rsplugins.runs.summary.radius_grid`.
    """
    verified = [run.manifest.parameters.get("eps") for run in runs]
    asked = {float(eps) for eps in verified if isinstance(eps, (int, float))}
    largest = max(summarise(run)["largest_radius"] for run in runs)
    if all(summarise(run)["norm"] == str(Threat.PATCH) for run in runs):  # whole pixels
        return sorted({0.0, *(row.radius for run in runs for row in run.rows)})
    if asked and None not in verified:
        return sorted({0.0, *asked})
    if all(summarise(run)["guarantee"] == "none" for run in runs):
        return []
    if _in_grey_levels(runs):
        largest = largest or 4 / 255
        step = next(step for step in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0) if 255 * largest / step < 10)
        return sorted({*(k * step / 255 for k in range(int(255 * largest / step * (1 + 1e-9)) + 1)), *asked})
    return sorted({*radius_grid(largest), *asked})


def radius_label(radius: float, runs: Sequence[Run]) -> str:
    """Return the heading of a column: ``r=2/255`` for small linf radii, ``r=0.5`` for others."""
    return f"r={radius_text(radius, Norm.LINF)}" if _in_grey_levels(runs) else f"r={radius:g}"


def _threat_text(norm: str | None) -> str:
    return "patches by their side in pixels" if norm == str(Threat.PATCH) else f"{norm or 'no'} norm"


def radius_text(radius: float, norm: Norm | None) -> str:
    """Return a radius as the field writes it: small linf ones, where they are, in grey levels of 255.

    >>> radius_text(8 / 255, Norm.LINF), radius_text(0.3, Norm.LINF), radius_text(0.5, Norm.L2)
    ('8/255', '0.3', '0.5')
    """
    levels = round(255 * radius, 9)
    in_levels = norm is Norm.LINF and 0 < radius < 0.1 and (8 * levels).is_integer() and levels / 255 <= radius
    if in_levels:
        return f"{levels:g}/255"
    text = f"{radius:g}"
    # A heading may not name a larger radius than the one that was counted at.
    return text if float(text) <= radius else round_down(radius, max(0, 6 - math.floor(math.log10(radius))))


def mean_text(rows: Sequence[Row]) -> str:
    """Return the average radius over all inputs as tables print it, rounded down."""
    mean = average_radius(rows)
    return round_down(mean, 4) if math.isfinite(mean) else str(mean)


def _in_grey_levels(runs: Sequence[Run]) -> bool:
    return all(summarise(run)["norm"] == "linf" and summarise(run)["largest_radius"] < 0.1 for run in runs)


def _cells(run: Run, grid: Sequence[float]) -> tuple[str, ...]:
    summary, total = summarise(run), max(1, len(run.rows))
    return (
        guarantee_label(run),
        _value(summary["n"]),
        _value(summary["sigma"]),
        str(summary["inputs"]),
        str(summary["failed"]),
        f"{100 * summary['abstention_rate']:.1f}",
        clean_cell(run),
        percent(summary["correct"], total),
        mean_text(run.rows),
        *(percent(certified_count(run.rows, radius), total) for radius in grid),
    )


def clean_cell(run: Run) -> str:
    """Return the model's accuracy without noise in percent, or a dash where the records do not say it."""
    count = summarise(run).get("clean_correct")
    return "-" if count is None else percent(count, max(1, len(run.rows)))


def percent(count: int, total: int) -> str:
    """Print a rate in percent with one digit, rounded down.

    Example:
        >>> percent(2, 3), percent(500, 500)
        ('66.6', '100.0')
    """
    return f"{1000 * count // total / 10:.1f}"


def _value(value: object) -> str:
    return (
        "-"
        if value is None
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return short names that tell runs apart: the method, and what else is needed."""
    methods = [run.manifest.method for run in runs]
    if len(set(methods)) == len(methods):
        return methods
    names = [f"{run.manifest.method} ({run.directory.name})" for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.manifest.method} ({run.directory})" for run in runs]


def compare_tables(first: Run, second: Run) -> list[Table]:
    """Compare two runs on the inputs that both have, paired by index.

    Returns:
        The result tables on the common inputs, and one table of the paired differences.
    """
    common = {row.index for row in first.rows} & {row.index for row in second.rows}
    pair = [_restrict(run, common) for run in (first, second)]
    names = run_names([first, second])
    rows = {row.index: row for row in pair[1].rows}
    pairs = [(row, rows[row.index]) for row in pair[0].rows]
    gains = [(b.radius if b.correct else 0.0) - (a.radius if a.correct else 0.0) for a, b in pairs]
    labels = sum(a.record.label != b.record.label for a, b in pairs)
    cells = [
        ("inputs in both", str(len(pairs))),
        (f"inputs only in {names[0]}", str(len(first.rows) - len(pairs))),
        (f"inputs only in {names[1]}", str(len(second.rows) - len(pairs))),
        ("labels that differ (the data are not the same when above 0)", str(labels)),
        ("both correct", str(sum(a.correct and b.correct for a, b in pairs))),
        (f"correct only in {names[0]}", str(sum(a.correct and not b.correct for a, b in pairs))),
        (f"correct only in {names[1]}", str(sum(b.correct and not a.correct for a, b in pairs))),
    ]
    if len({summarise(run)["norm"] for run in pair}) == 1:
        cells += [
            (f"larger radius in {names[0]}", str(sum(gain < 0 for gain in gains))),
            (f"larger radius in {names[1]}", str(sum(gain > 0 for gain in gains))),
            (f"mean radius difference, {names[1]} minus {names[0]}", f"{sum(gains) / max(1, len(gains)):+.6f}"),
        ]
    note = _warning(pair)
    return [*result_tables(pair, names), Table("Paired by input", ("", "value"), tuple(cells), text_columns=1, note=note)]


def _restrict(run: Run, indices: set[int]) -> Run:
    kept = tuple(row for row in run.rows if row.index in indices)
    return replace(run, rows=kept, missing=(), strays=())


def _warning(pair: Sequence[Run]) -> str:
    if any(run.problems for run in pair):
        return "One of the two does not verify: the difference says nothing."
    a, b = (summarise(run) for run in pair)
    if a["norm"] != b["norm"]:
        return f"The norms differ ({a['norm']} and {b['norm']}): the radii are not comparable, so they are not compared."
    if a["certifies"] != b["certifies"]:
        return "One of the two certifies nothing: its radii are not certificates, and the difference is no certified gain."
    here, there = (set(summary["assumptions"]) for summary in (a, b))
    if (CLIPPED in here) != (CLIPPED in there):
        return f"The radii of one of the two are {CLIPPED}. A larger one there is not a gain over the other."
    return ""
