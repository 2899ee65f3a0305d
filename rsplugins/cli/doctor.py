"""``rsplugins doctor``: what is installed, what is missing, and the lines that add it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rsplugins.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False) -> None:
    """Print versions, devices, missing optional parts and the lines that add them, plugin failures, data roots, the zoo."""
    from rsplugins.runs.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    for title, values in found.items():
        typer.echo(title.replace("_", " "))
        _echo(values)


def _echo(values: Any) -> None:
    if isinstance(values, dict):
        width = max(map(len, values), default=0)
        for key, value in values.items():
            typer.echo(f"  {key:<{width}}  {value}")
    for line in values if isinstance(values, list) else ():
        typer.echo("  " + (f"{line['name']}: {line['reason']}\n    {line['fix']}" if isinstance(line, dict) else str(line)))
    if not values:
        typer.echo("  none")
