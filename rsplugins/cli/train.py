"""``rsplugins train``: a recipe in, a checkpoint and its record out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsplugins.cli.output import plain_warnings, print_json, say, shown_path
from rsplugins.parameters import parse_settings


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("train")(train)


def train(
    recipe: Annotated[list[Path], typer.Argument(help="Recipes, trained one after another.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; with several recipes one directory each inside. Default: runs/NAME of the recipe."
        ),
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="Minutes for all recipes; what is there then is usable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $RSPLUGINS_DATA, else ./data.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="TABLE.KEY=VALUE of the recipe; repeatable.")] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Measure the trainer against the forward-backward limit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON; progress stays on standard error.")] = False,
) -> None:
    """Train the model of a recipe. The same command resumes a run that was interrupted.

    On several devices: torchrun --no-python --nproc-per-node=N rsplugins train RECIPE --out DIR

    Exit codes: 0 done or stopped by the time budget, 1 the loss was not finite, 2 wrong use, 130 the interrupt key and
    143 SIGTERM, both after a checkpoint.
    """
    from rsplugins.training.recipe import load_recipe
    from rsplugins.training.time_budget import train_all

    plain_warnings()
    overrides = parse_settings(set_ or (), "--set")
    recipes = [load_recipe(path, overrides) for path in recipe]
    if benchmark:
        for each in recipes:
            _benchmark(each, device, data_root)
        return
    home = out or Path("runs")
    folders = [home] if out is not None and len(recipes) == 1 else [home / each.name for each in recipes]
    seconds = None if time_budget is None else 60 * time_budget
    records = []
    for result in train_all(recipes, folders, device=device, data_root=data_root, time_budget=seconds):
        records.append(result.record)
        state = "" if result.status == "finished" else " (stopped by the time budget; the same command goes on)"
        say(f"{result.record['name']}: {shown_path(result.directory / 'model.safetensors')}{state}")
    if len(records) < len(recipes):
        say(f"the time budget was spent before: {', '.join(each.name for each in recipes[len(records) :])}")
    if as_json:
        print_json(records)


def _benchmark(recipe: object, device: str, data_root: Path | None) -> None:
    import tempfile

    from rsplugins.training.benchmark import measure
    from rsplugins.training.recipe import Recipe
    from rsplugins.training.trainer import Trainer

    assert isinstance(recipe, Recipe)
    with tempfile.TemporaryDirectory() as folder:
        speed = measure(Trainer(recipe, folder, device=device, data_root=data_root, quiet=True))
    print(  # noqa: T201
        f"{recipe.name}: forward-backward limit {speed.limit:,.0f} images/s, trainer {speed.trainer:,.0f} images/s, "
        f"ratio {speed.ratio:.3f}, {speed.epoch:.1f} s an epoch"
    )
