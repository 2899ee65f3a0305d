"""A self-contained HTML page about runs: tables, curves, distributions, settings. No script, no outside address."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from rsplugins.runs.plots import caption, curve_figure, estimate_figure, png, radius_figure
from rsplugins.runs.run import Run
from rsplugins.runs.summary import summarise
from rsplugins.runs.tables import (
    ATTACKED,
    CERTIFIED,
    PREDICTED,
    Table,
    compare_tables,
    group_runs,
    guarantee_label,
    result_tables,
    run_names,
)

_STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #2b2f36;
  max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; background: #fff; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
.sub { color: #6b7280; margin: 0 0 1.5rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .38rem .55rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th { color: #4b5563; font-weight: 600; border-bottom: 2px solid #9aa0a8; } .word { text-align: left; }
tbody tr:hover { background: #f6f8fa; } .note, figcaption { color: #6b7280; font-size: .85rem; max-width: 100ch; }
.estimate { border-left: 4px solid #E69F00; padding-left: 1rem; } .estimate h2 { color: #9a6700; }
figure { margin: 1.2rem 0; } img { max-width: 100%; width: 860px; height: auto; }
details { margin: .5rem 0; border: 1px solid #e5e7eb; border-radius: 6px; padding: .5rem .9rem; } summary { cursor: pointer; }
pre { font: .8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; margin: .6rem 0 .2rem; }
"""


def to_html(runs: Sequence[Run], *, compare: bool = False) -> str:
    """Return the page.

    Args:
        runs: at least one.
        compare: add the paired comparison of the first two.
    """
    names = run_names(runs)
    labels = dict(zip(map(id, runs), names, strict=True))
    tables = {table.title: table for table in result_tables(runs, names)}
    sections = [
        _section(title, tables[title], members, [labels[id(run)] for run in members])
        for title, members in group_runs(runs).items()
    ]
    sections += _estimates_against_certificates(runs)
    if compare and len(runs) == 2:
        paired = compare_tables(runs[0], runs[1])[-1]
        sections.append(f"<section><h2>{escape(paired.title)}</h2>{_table(paired)}</section>")
    details = "\n".join(_details(run, name) for run, name in zip(runs, names, strict=True))
    title = f"{runs[0].manifest.method}: certified robustness" if len(runs) == 1 else "Certified robustness, methods compared"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(_subject(runs))}</p>\n'
        + "\n".join(sections)
        + f"\n<h2>How each number came about</h2>\n{details}\n</body></html>\n"
    )


def _subject(runs: Sequence[Run]) -> str:
    places = {
        f"{run.manifest.model.get('reference', 'unknown model')} on {run.manifest.data.get('reference', 'unknown data')}"
        for run in runs
    }
    made = {f"rsplugins {run.manifest.versions['rsplugins']}" for run in runs if "rsplugins" in run.manifest.versions}
    return "; ".join([*sorted(places), *sorted(made)])


def _section(title: str, table: Table, runs: Sequence[Run], names: Sequence[str]) -> str:
    estimate = not title.startswith(CERTIFIED)
    settings = "; ".join(f"{name}: {caption(run) or 'no sampling'}" for run, name in zip(runs, names, strict=True))
    what = "Certified accuracy against the radius."
    if estimate:
        under = "under attack" if title.startswith(ATTACKED) else "of the model" if title.startswith(PREDICTED) else ""
        what = f"Accuracy {under or 'at the estimated radius'}; these radii are not certificates."
    curves = _figure(
        curve_figure(runs, names), f"{what} {settings}. Over all inputs; wrong, abstained and failed inputs count as 0."
    )
    spread = _figure(
        radius_figure(runs, names), "Distribution of the radii: an average alone can hide that a few easy inputs carry it."
    )
    mark = ' class="estimate"' if estimate else ""
    return f"<section{mark}><h2>{escape(title)}</h2>{_table(table)}{curves}{spread}</section>"


def _estimates_against_certificates(runs: Sequence[Run]) -> list[str]:
    """Return a scatter plot for every estimate that has a sampled radius of the same model, data, noise and norm beside it."""

    def subject(run: Run) -> tuple[object, ...]:
        summary = summarise(run)
        return summary["model"], summary["data"], summary["sigma"], summary["norm"]

    rated = [(run, summarise(run)["certifies"]) for run in runs if isinstance(summarise(run)["sigma"], (int, float))]
    pairs = [
        (a, b) for a, yes in rated if not (yes or a.problems) for b, certifies in rated if certifies and subject(a) == subject(b)
    ]
    text = "Estimated against certified radius; estimates are not certificates. On the line they agree."
    titles = [escape(f"{a.name} against {b.name}") for a, b in pairs]
    figures = [_figure(estimate_figure(a, b), text) for a, b in pairs]
    return [f'<section class="estimate"><h2>{t}</h2>{f}</section>' for t, f in zip(titles, figures, strict=True)]


def _table(table: Table) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="word">{escape(text)}</{tag}>' if column < table.text_columns else f"<{tag}>{escape(text)}</{tag}>"
            for column, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", table.header)}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    )


def _figure(figure: Figure, text: str) -> str:
    data = base64.b64encode(png(figure, dpi=120)).decode()
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}"><figcaption>{escape(text)}</figcaption></figure>'
    )


def _details(run: Run, name: str) -> str:
    summary = summarise(run)
    shown = {
        **({"problems": summary["problems"]} if run.problems else {}),
        "rules": summary["rules"],
        "assumptions": summary["assumptions"],
        **run.manifest.model_dump(mode="json", exclude_none=True, exclude={"format", "method"}),
        "forward passes": summary["samples"],
        "seconds": round(summary["seconds"], 3),
        "records sha256, without times": summary["records_sha256"],
    }
    listed = shown["selection"].get("listed")
    if listed and len(listed) > 40:
        shown["selection"] = {"listed": f"{len(listed)} indices, {listed[0]} to {listed[-1]}"}
    failures = [f"input {row.index}: {row.record.error}" for row in run.rows if row.failed]
    if failures:
        shown["failures"] = failures[:20] + ([f"and {len(failures) - 20} more"] if len(failures) > 20 else [])
    text = escape(json.dumps(shown, indent=2))
    return f"<details><summary>{escape(name)}: {escape(guarantee_label(run))}</summary><pre>{text}</pre></details>"
