"""``rsplugins certify``: certify a model on a data set with one method, several, or all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.cli.output import plain_warnings, print_json, print_runs, say, shown_path
from rsplugins.parameters import parse_settings

if TYPE_CHECKING:
    from rsplugins.runs.campaign import Campaign, Request


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("certify")(certify)


def certify(
    model: Annotated[str | None, typer.Option(help="Model, as scheme:name. Default: the embedded digits classifier.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set. Default: the embedded digits, when there is no --model.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method; repeatable. Default: all but latent (needs split=LAYER), alpha-crown (slow), attack, predict."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value for every method that has it, or method.key=value; repeatable. `rsplugins plugins show METHOD` lists "
            "the keys.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; with several methods one directory each inside. Default: under runs/.")
    ] = None,
    start: Annotated[int, typer.Option(help="First input.")] = 0,
    stop: Annotated[int | None, typer.Option(help="First input left out. Default: the end.")] = None,
    stride: Annotated[int, typer.Option(help="Every how many inputs; 20 takes every 20th.")] = 1,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $RSPLUGINS_DATA, else ./data.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    batch_size: Annotated[str, typer.Option(help="Images a forward pass, or auto. Results do not depend on it.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; part of what is certified.")] = "float32",
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile; part of what is certified.")] = False,
    sound: Annotated[
        bool, typer.Option("--sound", help="Noise on the grid of 8-bit images: no claim rests on float arithmetic being exact.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU when there is one.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n, i from 0 to n-1: certify the inputs at positions i, i+n, ...")] = None,
    stop_at: Annotated[
        list[float] | None, typer.Option(help="Stop an input once it is decided at this radius; repeatable.")
    ] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="key=value for the model source, such as pretrained=false; repeatable.")
    ] = None,
    denoiser: Annotated[
        str | None, typer.Option(help="Denoiser in front of the model, such as file:PATH, for the sigma of --set.")
    ] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option(help="key=value for the data set, such as resize=256, crop=224, classes=FILE; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON; progress stays on standard error.")] = False,
) -> None:
    """Certify a model on a data set.

    Without arguments: the embedded digits classifier, with the default certifiers. The same command resumes a run that was
    interrupted. Exit codes: 0 done, 1 a method or an input failed, 2 wrong use, 130 the interrupt key, 143 SIGTERM.
    """
    from rsplugins.certifier import Execution
    from rsplugins.machine.progress import for_stream
    from rsplugins.runs.campaign import Request, carry_out
    from rsplugins.runs.execute import parse_shard

    plain_warnings()
    size: Any = int(batch_size) if batch_size.isdigit() else batch_size
    width: Any = dtype
    request = Request(
        model=model,
        data=data,
        methods=tuple(method or ()),
        settings=parse_settings(set_ or (), "--set"),
        stop_at=tuple(stop_at or ()),
        out=out,
        start=start,
        stop=stop,
        stride=stride,
        data_root=data_root,
        split=split,
        model_options=parse_settings(model_option or (), "--model-option"),
        denoiser=denoiser,
        data_options=parse_settings(data_option or (), "--data-option"),
        device=device,
        execution=Execution(seed=seed, batch_size=size, dtype=width, compile=compile_, sound=sound),
        shard=None if shard is None else parse_shard(shard),
        command=("rsplugins", *sys.argv[1:]),
    )
    campaign = carry_out(request, for_stream())
    if campaign.leads:
        _print(campaign, request, as_json=as_json)
    raise typer.Exit(int(campaign.failed))


def _print(campaign: Campaign, request: Request, *, as_json: bool) -> None:
    from rsplugins.runs.summary import summarise

    runs = [run for run in campaign.runs if run.rows]
    if as_json:
        print_json(_as_dict(campaign))
    elif runs:
        print_runs(runs)
    for outcome in campaign.outcomes:
        if outcome.error is not None:
            say(f"{outcome.name}: {'skipped' if outcome.skipped else 'FAILED'}: {outcome.error}")
        if outcome.run is not None and outcome.run.missing:
            say(f"{outcome.name}: {len(outcome.run.missing)} inputs are left to other shards; the last one to end merges them")
    for doubt in sorted({text for run in runs if (text := summarise(run).get("doubt"))}):
        say(f"WARNING: {doubt}")
    failed = sum(row.failed for run in runs for row in run.rows)
    if failed:
        say(f"{failed} inputs failed; the reports say why")
    if not as_json:
        say(f"results: {shown_path(campaign.directory)}")
        if campaign.report is not None:
            say(f"report:  {shown_path(campaign.report)}")


def _as_dict(campaign: Campaign) -> dict[str, Any]:
    from rsplugins.runs.summary import summarise

    methods = []
    for outcome in campaign.outcomes:
        state = "done" if outcome.error is None else "skipped" if outcome.skipped else "failed"
        entry: dict[str, Any] = {"method": outcome.name, "status": state}
        if outcome.error is not None:
            entry |= {"error": outcome.error.what, "cause": outcome.error.cause, "fix": outcome.error.fix}
        if outcome.run is not None:
            entry |= {"directory": str(outcome.run.directory), "summary": summarise(outcome.run)}
        methods.append(entry)
    report = None if campaign.report is None else str(campaign.report)
    return {"directory": str(campaign.directory), "report": report, "methods": methods}
