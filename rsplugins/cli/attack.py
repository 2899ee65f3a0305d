"""``rsplugins attack``: clean, PGD and AutoAttack accuracy side by side. EMPIRICAL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rsplugins.cli.output import parse_settings, plain_warnings, print_json, say, shown_path


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("attack")(attack)


def attack(
    model: Annotated[str, typer.Option(help="Model, as scheme:name.")],
    data: Annotated[str, typer.Option(help="Data set.")],
    eps: Annotated[str, typer.Option(help="l-infinity budget on raw [0, 1] pixels, such as 8/255.")],
    out: Annotated[Path, typer.Option(help="Directory of the records; the same command resumes.")],
    images: Annotated[int, typer.Option(help="How many inputs.")] = 1000,
    stride: Annotated[int | None, typer.Option(help="Every how many-th input. Default: spread over the whole split.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of PGD, of size eps/4.")] = 20,
    autoattack: Annotated[str, typer.Option(help="standard, none, or a list such as apgd-ce,apgd-t.")] = "standard",
    batch_size: Annotated[int, typer.Option(help="Inputs at a time, and between two saves.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of all random starts.")] = 0,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $RSPLUGINS_DATA, else ./data.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    model_option: Annotated[list[str] | None, typer.Option(help="key=value for the model source; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Attack a model: PGD, the same with rescaled logits, and AutoAttack. Survival proves nothing.

    A gap of more than 5 points between PGD and AutoAttack is flagged as likely gradient masking where it is beyond the sampling
    error (McNemar's exact test, 1 %).
    """
    import dataclasses

    from rsplugins.machine.device import choose_device
    from rsplugins.models import load
    from rsplugins.training import robustness
    from rsplugins.training.recipe import DataSettings
    from rsplugins.training.schema import read
    from rsplugins.training.splits import open_table

    plain_warnings()
    chosen = {"standard": robustness.STANDARD, "none": ()}.get(autoattack, tuple(autoattack.split(",")))
    values: dict[str, Any] = {"eps": eps, "images": images, "steps": steps, "batch_size": batch_size, "seed": seed}
    values |= {} if stride is None else {"stride": stride}
    settings = read(robustness.AttackSettings, {**values, "autoattack": chosen}, "attack")
    where = choose_device(device)
    classifier = load(model, **parse_settings(model_option or (), "--model-option")).to(where)
    table = open_table(DataSettings(name=data, input_size=classifier.input_size), split, data_root, where).to(where)
    result = robustness.attack(
        classifier,
        table,
        settings,
        out,
        identity={"model": model, "data": data, "split": split, "weights": classifier.fingerprint()},
        progress=_progress(),
    )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _print(result, settings)
    say(f"records: {shown_path(out)}")


def _progress() -> Callable[[int, int], None]:
    begun: list[int] = []

    def show(done: int, total: int) -> None:
        resumes = not begun and done > 0
        begun.append(done)
        say(f"resuming: {done} of {total} inputs are attacked already" if resumes else f"attacked {done} of {total} inputs")

    return show


def _print(result: Any, settings: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"EMPIRICAL: l-infinity eps {settings.eps:.5f}, {result.images} inputs", box=box.SIMPLE_HEAD)
    values = {"clean": result.clean, f"PGD-{settings.steps}": result.pgd, "AutoAttack": result.autoattack}
    for name in values:
        shown.add_column(name, justify="right")
    shown.add_row(*("not run" if value is None else f"{100 * value:.1f}" for value in values.values()))
    console = Console(highlight=False)
    console.print(shown)
    scaled = ", ".join(f"logits x{factor} {100 * value:.1f}" for factor, value in result.scaled.items())
    console.print(f"scale check of PGD: {scaled}, margin loss {100 * result.margin:.1f}")
    for flag in result.flags:
        console.print(f"WARNING: {flag}", style="bold yellow")
    for note in result.notes:
        console.print(f"note: {note}")
