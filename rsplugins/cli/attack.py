"""``rsplugins attack``: clean, PGD and AutoAttack accuracy side by side, a short form of ``certify --method attack``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rsplugins.cli.output import plain_warnings, print_json, say, shown_path
from rsplugins.parameters import parse_settings


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("attack")(attack)


def attack(
    model: Annotated[str, typer.Option(help="Model, as scheme:name.")],
    data: Annotated[str, typer.Option(help="Data set.")],
    eps: Annotated[str, typer.Option(help="l-infinity budget on raw [0, 1] pixels, such as 8/255.")],
    out: Annotated[Path, typer.Option(help="Run directory; the same command resumes.")],
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
    denoiser: Annotated[str | None, typer.Option(help="Denoiser in front of the model, for noise of .25.")] = None,
    data_option: Annotated[list[str] | None, typer.Option(help="key=value for the data set; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Attack a model: PGD, the same with rescaled logits, and AutoAttack. Survival proves nothing.

    A gap of more than 5 points between PGD and AutoAttack is flagged as likely gradient masking where it is beyond the sampling
    error (McNemar's exact test, 1 %). What is written is a run: `rsplugins verify`, `report` and `merge` take it.
    """
    from rsplugins.certifier import Execution
    from rsplugins.machine.progress import for_stream
    from rsplugins.runs.campaign import Request, carry_out
    from rsplugins.runs.summary import summarise

    plain_warnings()
    given = parse_settings([f"eps={eps}"], "--set")
    request = Request(
        model=model,
        data=data,
        methods=("attack",),
        settings={**given, "steps": steps, "autoattack": autoattack, "batch": batch_size},
        out=out,
        stride=stride,
        images=images,
        data_root=data_root,
        split=split,
        model_options=parse_settings(model_option or (), "--model-option"),
        denoiser=denoiser,
        data_options=parse_settings(data_option or (), "--data-option"),
        device=device,
        execution=Execution(seed=seed),
        command=("rsplugins", *sys.argv[1:]),
    )
    campaign = carry_out(request, for_stream())
    if not campaign.leads:
        return
    for run in campaign.runs:
        found = summarise(run)["attacks"]
        if as_json:
            print_json(found)
        else:
            _print(found, run.manifest.parameters)
    say(f"records: {shown_path(out)}")
    raise typer.Exit(int(campaign.failed))


def _print(result: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"EMPIRICAL: l-infinity eps {settings['eps']:.5f}, {result['images']} inputs", box=box.SIMPLE_HEAD)
    values = {"clean": result["clean"], f"PGD-{settings['steps']}": result["pgd"], "AutoAttack": result["autoattack"]}
    for name in values:
        shown.add_column(name, justify="right")
    shown.add_row(*("not run" if value is None else f"{100 * value:.1f}" for value in values.values()))
    console = Console(highlight=False)
    console.print(shown)
    scaled = ", ".join(f"logits x{factor} {100 * value:.1f}" for factor, value in result["scaled"].items())
    console.print(f"scale check of PGD: {scaled}, margin loss {100 * result['margin']:.1f}")
    for flag in result["flags"]:
        console.print(f"WARNING: {flag}", style="bold yellow")
    for note in result["notes"]:
        console.print(f"note: {note}")
