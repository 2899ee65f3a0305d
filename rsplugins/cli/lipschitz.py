"""``rsplugins lipschitz``: Lipschitz bounds by layer, and where a cut pays."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.cli.models import load_behind
from rsplugins.errors import UsageError

if TYPE_CHECKING:
    from rsplugins.lipschitz.analysis import Analysis, Cut


def register(app: typer.Typer) -> None:
    """Add the command ``lipschitz`` to the application."""
    app.command("lipschitz")(lipschitz)


def lipschitz(
    model: Annotated[str, typer.Argument(help="Model reference, such as timm:resnet18 or zoo:NAME.")],
    input_size: Annotated[str | None, typer.Option(help="C,H,W of a raw image, when the model does not say it.")] = None,
    until: Annotated[
        str | None, typer.Option(help="Bound only as far as this layer: the bounds of wide layers take time.")
    ] = None,
    denoiser: Annotated[str | None, typer.Option(help="Denoiser in front of the model, for noise of .25.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Print an upper bound of each layer's Lipschitz constant, and which cut gives the best bound for its share of the cost."""
    from rsplugins.lipschitz.analysis import analyse

    size = _size(input_size) if input_size else None
    analysis = analyse(load_behind(model, denoiser), size).until(until)
    rows, cuts = analysis.rows(), analysis.cuts()
    front = pareto(cuts)
    if as_json:
        marked = [{**_finite(dataclasses.asdict(cut)), "best": cut in front} for cut in cuts]
        typer.echo(
            json.dumps({"model": model, "layers": [_finite(dataclasses.asdict(r)) for r in rows], "cuts": marked}, indent=2)
        )
        return
    _print_layers(analysis)
    _print_cuts(cuts, front)


def pareto(cuts: list[Cut]) -> list[Cut]:
    """Return the cuts that no other one beats in both bound and share of the cost.

    Example:
        >>> from rsplugins.lipschitz.analysis import Cut
        >>> cuts = [Cut("stem", 2.0, 0.1), Cut("pool", 4.0, 0.1), Cut("layer1", 8.0, 0.5), Cut("head", None, 0.9)]
        >>> [cut.layer for cut in pareto(cuts)]
        ['stem', 'layer1']
    """
    usable = [(cut, cut.constant) for cut in cuts if cut.constant is not None and math.isfinite(cut.constant)]
    return [
        cut
        for cut, bound in usable
        if not any(
            (other.share >= cut.share and least <= bound) and (other.share > cut.share or least < bound)
            for other, least in usable
        )
    ]


def _print_layers(analysis: Analysis) -> None:
    rows = analysis.rows()
    width = max(len(row.name) for row in rows)
    typer.echo(f"{'layer':<{width}}  {'kind':<20} {'bound':>11} {'so far':>11}")
    for row in rows:
        numbers = f"{_number(row.factor):>11} {_number(row.constant):>11}"
        typer.echo(f"{row.name:<{width}}  {row.kind[:20]:<20} {numbers}  {row.note}".rstrip())


def _print_cuts(cuts: list[Cut], front: list[Cut]) -> None:
    if not cuts:
        typer.echo("\nNo layer's output carries everything: there is no cut.")
        return
    width = max(len("split"), *(len(cut.layer) for cut in cuts))
    typer.echo(
        f"\n{'split':<{width}}  {'L':>11} {'cost share':>11} {'speed-up':>9}   (* = no other cut has a smaller L at that share)"
    )
    for cut in cuts:
        # N / (e + N (1 - e)) for many samples.
        speed = f"{1 / max(1 - cut.share, 1e-9):.2f}x" if cut.share < 0.9999 else "the rest"
        mark = "*" if cut in front else ""
        typer.echo(f"{cut.layer:<{width}}  {_number(cut.constant):>11} {cut.share:>10.1%} {speed:>9}   {mark}".rstrip())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) not in (3, 4) or min(size) < 1:
        raise UsageError(f"--input-size is {text!r}; expected C,H,W such as 3,32,32.")
    return size
