"""The application: collects the commands, and turns errors into exit codes.

Exit codes: 0 done, 1 a failed check, 2 wrong use, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from rsplugins.errors import RspluginsError
from rsplugins.stopping import EXIT_CODES, ended, terminable

_INTERRUPTED = 130
_RESUMED = ("certify", "train", "attack")

COMMANDS = ("certify", "runs", "plugins", "new", "bench", "doctor", "train", "attack", "lipschitz", "zoo")
"""Modules of this package, each with ``register(app)``; they import heavy modules only inside their functions."""


def build(first: str = "") -> typer.Typer:
    """Return the application with every command registered.

    Args:
        first: the first word of a command line: where a module of that name has it, the others are not imported.
    """
    app = typer.Typer(
        name="rsplugins",
        help="Certify a pretrained classifier with any installed method, and know exactly what is guaranteed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    ) -> None:
        """Certify a pretrained classifier with any installed method, and know exactly what is guaranteed."""

    for name in [first] if first in COMMANDS else COMMANDS:
        importlib.import_module(f"rsplugins.cli.{name}").register(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from rsplugins.provenance import version

        typer.echo(f"rsplugins {version()}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        with terminable():
            build(sys.argv[1] if len(sys.argv) > 1 else "")()
    except RspluginsError as error:
        print(f"rsplugins: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns the interrupt key into this exit code, without a word
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        _say_ended(sys.argv[1:])
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _leave_the_pipe()
        else:
            place = f" {error.filename}" if error.filename else ""
            print(f"rsplugins: the file system refuses{place}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
            print("  next step: check the path, its permissions and the free space; the same command resumes", file=sys.stderr)  # noqa: T201
            sys.exit(1)
    sys.exit(0)


def _say_ended(words: list[str]) -> NoReturn:
    """Say what is kept and how to go on; commands that keep nothing say nothing of it."""
    number, notes = ended()
    what = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    if not notes and words and words[0] in _RESUMED:
        notes = ["what was computed is kept (of training, its last checkpoint), and the same command resumes"]
    print("\n  ".join(["; ".join([f"rsplugins: {what}", *notes[:1]]), *notes[1:]]), file=sys.stderr)  # noqa: T201
    sys.exit(EXIT_CODES[signal.Signals(number)])


def _leave_the_pipe() -> None:
    """The reader (``| head``) has what it wanted; without this, closing standard output would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
