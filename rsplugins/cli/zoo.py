"""``rsplugins zoo``: list, show, fetch, verify, card, publish, add."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsplugins.cli.output import plain_warnings, print_json, say, shown_path
from rsplugins.errors import UsageError

if TYPE_CHECKING:
    from rsplugins.zoo.verify import Report

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Models = Annotated[list[str] | None, typer.Argument(help="Ids, or folders of models. Default: all.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $RSPLUGINS_DATA, else ./data.")]
Home = Annotated[Path | None, typer.Option("--zoo", help="Folder of models. Default: $RSPLUGINS_ZOO, else the checkout's zoo.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    zoo = typer.Typer(help="Models with the evidence behind every number.", no_args_is_help=True, rich_markup_mode=None)
    for name, command in (
        ("list", list_),
        ("show", show),
        ("fetch", fetch),
        ("verify", verify),
        ("card", card),
        ("publish", publish),
        ("add", add),
    ):
        zoo.command(name)(command)
    app.add_typer(zoo, name="zoo")


def list_(as_json: Json = False) -> None:
    """List the models that `zoo:ID` finds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from rsplugins.models import manifest as manifests
    from rsplugins.models import store

    found = [(folder, manifests.read(folder)) for folder in store.folders().values()]
    if as_json:
        print_json([{"folder": str(folder), **manifest.model_dump(mode="json", exclude_none=True)} for folder, manifest in found])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "trained on", "kB", "summary"):
        table.add_column(heading, no_wrap=heading != "summary", justify="right" if heading == "kB" else "left")
    for _, manifest in found:
        size = sum(weights.bytes for weights in manifest.weights)
        trained = manifest.training.device if manifest.training else "no weights" if manifest.no_weights else "by others"
        table.add_row(manifest.id, trained, f"{size / 1000:,.0f}" if size else "", manifest.summary)
    Console(highlight=False, width=None if _is_terminal() else 160).print(table)


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def show(model: Annotated[str, typer.Argument(help="Id, or folder of a model.")], as_json: Json = False) -> None:
    """Show a model: what it is, how it was made, every number and what it promises."""
    from rsplugins.models import manifest as manifests
    from rsplugins.zoo import cards

    (folder,) = _folders([model])
    manifest = manifests.read(folder)
    if as_json:
        print_json({"folder": str(folder), **manifest.model_dump(mode="json", exclude_none=True)})
        return
    typer.echo(cards.card(manifest, curve=False))
    say(f"folder: {shown_path(folder)}")


def fetch(
    source: Annotated[str, typer.Argument(help="A folder of a model or of several, or hf:OWNER/NAME.")],
    model: Annotated[str, typer.Option("--id", help="Take this model only.")] = "",
    to: Annotated[Path | None, typer.Option(help="Folder of models. Default: $RSPLUGINS_ZOO, else the user's cache.")] = None,
) -> None:
    """Fetch a model from elsewhere. Hashes are checked before anything is loaded; nothing is unpickled."""
    from rsplugins.models import store
    from rsplugins.zoo.fetch import fetch as bring

    for folder in bring(source, identifier=model, destination=to):
        typer.echo(f"{folder.name}: {folder}")
        known = store.folders().get(folder.name)
        if known is None:
            say(f"zoo:{folder.name} does not find it there; set RSPLUGINS_ZOO={folder.parent}")
        elif known.resolve() != folder.resolve():
            say(f"zoo:{folder.name} goes on naming {known}, which comes first")


def verify(
    models: Models = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without the model: no weights are loaded, nothing is run again.")
    ] = False,
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Check files, hashes and licences, recompute every number from the records, and run a small sample again.

    Exit code 1 when something differs.
    """
    from rsplugins.zoo.verify import verify as check

    plain_warnings()
    reports = []
    for folder in _folders(models or []):
        report = check(folder, quick=quick, data_root=data_root)
        reports.append(report)
        if not as_json:
            _print(report)
    if as_json:
        print_json([{**dataclasses.asdict(report), "ok": not report.problems} for report in reports])
    raise typer.Exit(int(any(report.problems for report in reports)))


def _print(report: Report) -> None:
    done = [f"{report.numbers} numbers recomputed"]
    if report.rerun:
        done.append(f"run again: {', '.join(report.rerun)}")
    typer.echo(f"{'FAILED' if report.problems else 'ok    '} {report.id}: {'; '.join(done)}")
    for problem in report.problems:
        typer.echo(f"       {problem}")
    for note in report.notes:
        typer.echo(f"       ({note})")


def card(models: Models = None, zoo: Home = None) -> None:
    """Write the README of each model, and the table of the zoo with its curves."""
    from rsplugins.zoo import cards

    home = _home(zoo)
    known = {path.parent.name: path.parent for path in home.glob("*/manifest.toml")}
    unknown = [model for model in models or [] if model not in known]
    for folder in [known[name] for name in sorted(known) if not models or name in models] + [Path(model) for model in unknown]:
        typer.echo(shown_path(cards.write_card(folder)))
    typer.echo(shown_path(cards.write_table(home)))


def publish(
    out: Annotated[Path, typer.Argument(help="Folder to write; with several models one folder each inside.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Id, or folder of a model; repeatable. Default: all.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME: also upload it there, with a token; one model only.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Of Hugging Face; nothing is uploaded without.")] = None,
) -> None:
    """Write the layout of a Hugging Face repository: safetensors, config.json, README.md with a model-index."""
    from rsplugins.models import manifest as manifests
    from rsplugins.zoo.publish import publish as write
    from rsplugins.zoo.publish import upload

    folders = _folders(model or [])
    # Without being named, models without weights are left out.
    folders = folders if model else [folder for folder in folders if manifests.read(folder).weights]
    if repo is not None and len(folders) != 1:
        raise UsageError("--repo takes one model.", fix="Name it with --model.")
    if repo is not None and not token:
        raise UsageError(
            "Nothing is uploaded without a token.", fix="Set HF_TOKEN, or leave --repo out to write the folder only."
        )
    for folder in folders:
        place = write(folder, out if model and len(folders) == 1 else out / folder.name)
        typer.echo(shown_path(place))
        if repo is not None:
            typer.echo(upload(place, repo, token))


def add(
    source: Annotated[str, typer.Argument(help="What `rsplugins train` wrote; a recipe, for a model without weights; or an id.")],
    evidence: Annotated[
        list[Path] | None, typer.Option(help="Run about this model, of `rsplugins certify` or `attack`; repeatable.")
    ] = None,
    summary: Annotated[str, typer.Option(help="One sentence. Default: the title of the recipe in zoo/recipes.")] = "",
    zoo: Home = None,
    data_root: DataRoot = None,
) -> None:
    """Put a trained model, or more evidence about a model, into the zoo."""
    from rsplugins.zoo.add import add_evidence, add_recipe, add_trained

    plain_warnings()
    path, home = Path(source), _home(zoo)
    if path.suffix == ".toml":
        folder = add_recipe(path, home)
    elif (path / "training.json").is_file():
        folder = add_trained(path, home, summary=summary, data_root=data_root, say=say)
    else:
        (folder,) = _folders([source])
    for directory in evidence or []:
        add_evidence(folder, directory)
    typer.echo(shown_path(folder))


def _folders(models: list[str]) -> list[Path]:
    """Return folders of models by id or path; all that ``zoo:`` finds when none is named."""
    from rsplugins.models import manifest as manifests
    from rsplugins.models import store

    if not models:
        return list(store.folders().values())
    return [
        Path(model) if (Path(model) / manifests.FILE).is_file() else store.find(model.removeprefix("zoo:")) for model in models
    ]


def _home(zoo: Path | None) -> Path:
    from rsplugins.models import store

    if zoo is not None:
        if not zoo.is_dir():
            raise UsageError(f"{zoo} is no folder.", fix="Make it first.")
        return zoo
    return store.places()[0]
