"""Figures of runs, drawn with matplotlib's Figure objects: no global state, no display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rsplugins.certificate import axis_text
from rsplugins.runs.rows import Row
from rsplugins.runs.run import Run
from rsplugins.runs.summary import summarise
from rsplugins.runs.tables import run_names

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_LINES: tuple[Any, ...] = ("-", (0, (1, 1)), (0, (6, 1, 1, 1)))
_INK, _FAINT = "#2b2f36", "#d9dce1"


def caption(run: Run) -> str:
    """Return the settings that a curve depends on, n, alpha and sigma among them, as far as the method has them.

    Example: ``sigma=0.25, n=10,000, alpha=0.001``.
    """
    summary = summarise(run)
    parts = [f"sigma={summary['sigma']:g}"] if isinstance(summary["sigma"], (int, float)) else []
    if isinstance(summary["n"], int):
        parts.append(f"n={summary['n']:,}")
    if summary["dataset_alpha"] is not None:
        parts.append(f"alpha={summary['dataset_alpha']:g} over all inputs")
    elif summary["alpha"] is not None:
        parts.append(f"alpha={summary['alpha']:g}")
    return ", ".join(parts)


_LABELS = {"estimate": "accuracy at the estimated radius", "empirical": "accuracy under attack", "none": "accuracy"}


def curve_figure(runs: Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """Draw certified accuracy against the radius, one curve a run, over all of its inputs.

    Args:
        runs: with one norm and on one side of the line between certificates and estimates (estimates are drawn dashed).
        names: of the curves; by default :func:`~rsplugins.runs.tables.run_names`.
    """
    figure = Figure(figsize=(7.2, 4.1 + 0.18 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    summaries = [summarise(run) for run in runs]
    end = max((summary["largest_radius"] for summary in summaries), default=0.0) * 1.04 or 1.0
    for number, (run, summary, name) in enumerate(zip(runs, summaries, names or run_names(runs), strict=True)):
        radii = sorted(row.radius for row in run.rows if row.correct)
        total = max(1, len(run.rows))
        # The rate of inputs with radius >= r falls by one input just after each radius.
        xs, ys = [0.0], [len(radii) / total]
        for k, radius in enumerate(radii):
            xs.append(radius)
            ys.append((len(radii) - k) / total)
        xs += [xs[-1], end]
        ys += [0.0, 0.0]
        label = ": ".join(filter(None, (name, caption(run))))
        # Dashes mean an estimate; another look of the line tells curves apart that have one colour.
        style = _LINES[number // len(COLOURS) % len(_LINES)] if summary["certifies"] else (0, (5, 2))
        axes.step(xs, ys, where="pre", color=COLOURS[number % len(COLOURS)], linestyle=style, linewidth=1.8, label=label)
    label = next((_LABELS.get(str(summary["guarantee"]), "") for summary in summaries), "") or "certified accuracy"
    norm = next((summary["norm"] for summary in summaries if summary["norm"]), "")
    axes.set_xlabel(axis_text(norm))
    axes.set_ylabel(label)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(axes)
    # Below the axes: inside them no corner is free of every curve.
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower left")
    inputs = ", ".join(sorted({f"{summary['inputs']:,}" for summary in summaries}))
    place = " on ".join(str(summaries[0][key]) for key in ("model", "data") if summaries[0][key]) if summaries else ""
    axes.set_title(", ".join(filter(None, (place, f"{inputs} inputs"))), loc="left", fontsize=10, color=_INK)
    return figure


def radius_figure(runs: Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """Draw the distribution of the radii of each run, right and wrong predictions apart, with the abstentions counted.

    An average hides it: a few very easy inputs can carry an average certified radius.
    """
    figure = Figure(figsize=(7.2, 0.7 + 1.35 * len(runs)), layout="constrained")
    end = max((row.radius for run in runs for row in run.rows), default=0.0) * 1.02 or 1.0
    grid = figure.subplots(len(runs), 1, squeeze=False, sharex=True)
    for axes, run, name in zip(grid[:, 0], runs, names or run_names(runs), strict=True):
        summary = summarise(run)
        right = [row.radius for row in run.rows if row.correct]
        wrong = [row.radius for row in run.rows if row.prediction is not None and not row.correct]
        bins = [end * k / 40 for k in range(41)]
        labels = [f"right ({len(right)})", f"wrong ({len(wrong)})"]
        axes.hist([right, wrong], bins=bins, stacked=True, color=[COLOURS[0], COLOURS[1]], label=labels)
        _plain(axes)
        axes.set_title(name, loc="left", fontsize=9.5, color=_INK)
        text = f"abstained {summary['abstained']}, failed {summary['failed']}"
        axes.set_title(text, loc="right", fontsize=8.5, color="#6b7280")
        axes.set_ylabel("inputs", fontsize=8.5)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set_xlim(0, end)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    norm = next((summarise(run)["norm"] for run in runs if summarise(run)["norm"]), "")
    grid[-1, 0].set_xlabel(axis_text(norm))
    return figure


def estimate_figure(estimate: Run, certified: Run) -> Figure:
    """Draw the estimated radius of each input against its certified one, where both predict the same class.

    Points above the line are inputs whose radius was estimated larger than could be certified. That includes the sampling's own
    limit: votes have a largest radius, estimates have none.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    known = {row.index: row for row in certified.rows if row.prediction is not None}
    pairs = [(known[row.index].radius, row.radius) for row in estimate.rows if _same_class(row, known.get(row.index))]
    end = max((radius for pair in pairs for radius in pair), default=0.0) * 1.04 or 1.0
    axes.plot([0, end], [0, end], color="#9aa0a8", linewidth=0.9)
    if pairs:
        axes.scatter([x for x, _ in pairs], [y for _, y in pairs], s=9, color=COLOURS[0], alpha=0.7)
    axes.set_xlabel(f"certified radius: {certified.name}")
    axes.set_ylabel(f"estimated radius: {estimate.name}")
    axes.set_title(f"{len(pairs)} inputs of equal prediction", loc="left", fontsize=9.5, color=_INK)
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    _plain(axes)
    return figure


def _same_class(estimated: Row, certified: Row | None) -> bool:
    return certified is not None and estimated.prediction is not None and estimated.prediction == certified.prediction


def _plain(axes: object) -> None:
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
    axes.spines[["left", "bottom"]].set_color("#9aa0a8")  # type: ignore[attr-defined]
    axes.grid(color=_FAINT, linewidth=0.6)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    axes.tick_params(colors=_INK, labelsize=9, length=3)  # type: ignore[attr-defined]


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
