"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY = 30.0
"""Seconds between plain lines within an epoch."""


class Progress:
    """Shows where a run is; a context manager.

    Args:
        name: of the run.
        epochs: length of the run.
        steps: of an epoch.
        quiet: show nothing.
    """

    def __init__(self, name: str, epochs: int, steps: int, *, quiet: bool = False) -> None:
        self.name, self.epochs, self.steps, self.quiet = name, epochs, steps, quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.epochs * self.steps, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, epoch: int, step: int) -> None:
        """Say that a step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch * self.steps + step + 1, text=f"epoch {epoch + 1}/{self.epochs}")
        elif not self.quiet and time.monotonic() - self._last > PLAIN_EVERY:
            self.say(f"{self.name}: epoch {epoch + 1}/{self.epochs}, step {step + 1}/{self.steps}")

    def epoch(self, row: dict[str, Any]) -> None:
        """Say the numbers of an epoch."""
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items() if name not in ("epoch", "seconds")
        )
        self.say(f"{self.name}: epoch {row['epoch'] + 1}/{self.epochs} in {row['seconds']:.1f} s: {shown}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._last = time.monotonic()
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
