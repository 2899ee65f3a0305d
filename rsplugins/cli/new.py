"""``rsplugins new``: write a plugin package to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("new")(new)


def new(
    name: Annotated[str, typer.Argument(help="What the plugin brings is called so: lower-case letters, digits, hyphens.")],
    kind: Annotated[
        str, typer.Option(help="certifier, training-hook, model-source, denoiser, dataset, bound-operator or moment-rule.")
    ] = "certifier",
    directory: Annotated[Path, typer.Option(help="Where the folder NAME is made.")] = Path(),
) -> None:
    """Write a plugin package that installs, works and passes its contract before anything is changed."""
    from rsplugins.errors import ParameterError
    from rsplugins.host import get_host
    from rsplugins.host.hookspecs import PROJECT
    from rsplugins.scaffold import EXAMPLES, write_plugin

    if any((entry.kind, entry.name, entry.distribution) == (kind, name, PROJECT) for entry in get_host().entries()):
        cause = "the built-in one would keep the name, and yours could not be used"
        raise ParameterError(f"There is a built-in {kind} named {name!r}.", cause=cause, fix="Choose another name.")

    for path in write_plugin(name, kind, directory):
        typer.echo(f"wrote {path}")
    more = f" --reference {EXAMPLES[kind]}" if kind in EXAMPLES else ""
    typer.echo(f"\nnext: pip install -e {directory / name} && rsplugins plugins check {name} --kind {kind}{more}")
