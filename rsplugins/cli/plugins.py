"""``rsplugins plugins``: what is installed, and why something does not work. Imports no heavy module."""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsplugins.errors import RspluginsWarning

if TYPE_CHECKING:
    from rsplugins.host import Entry
    from rsplugins.host.parameters import Parameter

PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where rich would assume 80."""


def register(app: typer.Typer) -> None:
    """Add the ``plugins`` commands to the application."""
    plugins = typer.Typer(help="Show the installed plugins.", no_args_is_help=True, rich_markup_mode=None)
    plugins.command("list")(list_plugins)
    plugins.command("show")(show_plugin)
    plugins.command("check")(check_plugin)
    app.add_typer(plugins, name="plugins")


def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list for machines.")] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            help="certifier, model-source, denoiser, dataset, bound-operator, moment-rule, training-hook, plugin (failed ones)."
        ),
    ] = None,
) -> None:
    """List what the installed plugins bring: guarantee, norms, where from, and whether it works.

    Exits with 0 even when a plugin failed: the list is where one looks that up.
    """
    from rsplugins.host import get_host

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RspluginsWarning)  # the list itself says what failed
        entries = get_host().entries(kind)
    if as_json:
        typer.echo(json.dumps([_row(entry) for entry in entries], indent=2))
    else:
        _print_table(entries)


def show_plugin(
    name: Annotated[str, typer.Argument(help="What a plugin brings, as `rsplugins plugins list` names it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list for machines.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only this kind, where several have the name.")] = None,
) -> None:
    """Show what a plugin brings, and what can be set of it: names, types, ranges, defaults, meanings."""
    from rsplugins.cli.output import plain_warnings
    from rsplugins.errors import UnknownNameError
    from rsplugins.host import Status, get_host
    from rsplugins.host.parameters import parameters

    plain_warnings()
    entries = get_host().entries(kind)
    found = [entry for entry in entries if entry.name == name]
    if not found:
        raise UnknownNameError(kind or "plugin", name, {entry.name for entry in entries})
    shown = [(entry, parameters(entry) if entry.status is Status.ACTIVE else []) for entry in found]
    if as_json:
        rows = [{**_row(entry), "parameters": [vars(each) for each in known]} for entry, known in shown]
        typer.echo(json.dumps(rows, indent=2, default=str))
        return
    for entry, known in shown:
        _print_entry(entry, known)


def check_plugin(
    name: Annotated[str, typer.Argument(help="What a plugin brings, as `rsplugins plugins list` names it.")],
    kind: Annotated[str | None, typer.Option(help="Only this kind, where several have the name.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value: a parameter to check it with; repeatable.")] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="A model that a source can load here; what follows a data set's colon; or module:attribute, which makes a layer "
            "with the operator of a bound operator or moment rule."
        ),
    ] = "",
    about: Annotated[
        str | None, typer.Option(help="What a certifier's claims are about: classifier, smoothed, or own; see docs.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only the checks whose name holds this text.")] = "",
    thorough: Annotated[bool, typer.Option("--thorough", help="Ten times as many images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list for machines.")] = False,
) -> None:
    """Put a plugin through its contract: each check with what was seen, or why it failed.

    An estimate is measured in place of judged. Exit codes: 0 kept, 1 broken, 2 wrong use.
    """
    import dataclasses

    from rsplugins.parameters import parse_settings
    from rsplugins.testing.finding import checks_for

    checks = checks_for(kind, name, parse_settings(set_ or (), "--set"), reference=reference, about=about, thorough=thorough)
    outcomes = []
    for check in [check for check in checks if only in check.name]:
        outcomes.append(check.outcome())
        if not as_json:
            typer.echo(f"{outcomes[-1].status:<9} {outcomes[-1].name}: {outcomes[-1].detail}")
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=2))
    else:
        counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("passed", "measured", "skipped")}
        typer.echo(f"\n{name}: {', '.join(f'{count} {status}' for status, count in counts.items())}, {len(failed)} failed")
    raise typer.Exit(int(bool(failed)))


def _row(entry: Entry) -> dict[str, Any]:
    """The fields of one entry as plain JSON values; what its kind does not have is null or empty."""
    descriptor = entry.descriptor
    guarantee, operator = getattr(descriptor, "guarantee", None), getattr(descriptor, "operator", None)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "guarantee": None if guarantee is None else str(guarantee),
        "norms": [str(norm) for norm in getattr(descriptor, "norms", ())],
        "distribution": entry.distribution,
        "version": entry.version,
        "plugin": entry.plugin,
        "status": str(entry.status),
        "reason": entry.reason,
        "fix": entry.fix,
        "summary": "" if descriptor is None else descriptor.summary,
        "factory": "" if descriptor is None else descriptor.factory,
        "argument": getattr(descriptor, "argument", ""),
        **({} if operator is None else {"operator": operator}),
    }


def _print_table(entries: list[Entry]) -> None:
    """A table of short words, then a paragraph for each entry that is not active: a command in a narrow cell cannot be copied."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console = Console(highlight=False, width=PIPED_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("name", "kind", "guarantee", "norms", "distribution", "status"):
        # when it gets narrow, what strangers chose folds, and our own words stay whole
        table.add_column(header, overflow="fold", no_wrap=header in ("kind", "guarantee", "status"))
    for row in map(_row, entries):
        name = row["name"] + (f":{row['argument']}" if row["argument"] else "")
        origin = f"{row['distribution']} {row['version']}"
        table.add_row(*_plain(name, row["kind"], row["guarantee"] or "", ", ".join(row["norms"]), origin, row["status"]))
    console.print(table)
    for row in map(_row, entries):
        if row["status"] != "active":
            typer.echo(f"{row['name']} ({row['kind']}, {row['distribution']} {row['version']}) {row['status']}: {row['reason']}")
            typer.echo(f"    {row['fix']}\n")


_HOW = {
    "certifier": "set by --set NAME=VALUE, or rsplugins.certify(..., NAME=VALUE)",
    "training-hook": "set by NAME = VALUE under [[hooks]] in a recipe",
    "model-source": "set by --model-option NAME=VALUE, or rsplugins.load(..., NAME=VALUE)",
    "dataset": "set by --data-option NAME=VALUE, or rsplugins.data.load(..., NAME=VALUE)",
}
_TAKEN = {
    "bound-operator": "taken by bound certifiers (estimates by etb) where a network has it; --set exclude=NAME leaves it out",
    "moment-rule": "taken by covariance and covariance-guided where a network has it",
}


def _print_entry(entry: Entry, known: list[Parameter]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    row = _row(entry)
    typer.echo(f"{entry.label}: {row['summary']}")
    guarantee = f"{row['guarantee']}; " if row["guarantee"] else ""
    typer.echo(f"  {guarantee}{', '.join(row['norms'])}{'; ' if row['norms'] else ''}{row['factory']}")
    if "operator" in row:
        asked = getattr(entry.descriptor, "default", True)
        typer.echo(f"  operator {row['operator']}; {_TAKEN[entry.kind] if asked else 'taken by certifiers that name it'}")
    if row["status"] != "active":
        typer.echo(f"  {row['status']}: {row['reason']}\n    {row['fix']}\n")
        return
    if not known:
        typer.echo("  it has no parameters\n")
        return
    typer.echo(f"  {_HOW[entry.kind]}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("name", "type", "range", "default", "meaning"):
        table.add_column(header, overflow="fold", no_wrap=header == "name")
    for each in known:
        default = "required" if each.required else "none" if each.default is None else str(each.default)
        table.add_row(*_plain(each.name, each.type, each.range, default, each.meaning))
    console.print(table)


def _plain(*cells: str) -> list[Any]:
    """Cells as text that rich does not read as markup: names and versions come from strangers."""
    from rich.text import Text

    return [Text(cell) for cell in cells]
