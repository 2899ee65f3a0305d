"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

Advance = Callable[[], None]


class Progress(Protocol):
    """Shows how far a task is."""

    def say(self, text: str) -> None:
        """Print a line."""

    def task(self, title: str, total: int, done: int = 0, unit: str = "inputs") -> AbstractContextManager[Advance]:
        """Start a task of ``total`` units, ``done`` of which were done before; the function it gives is called once a unit."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    @contextmanager
    def task(self, title: str, total: int, done: int = 0, unit: str = "inputs") -> Iterator[Advance]:
        """Start a task."""
        yield lambda: None


class Lines:
    """Prints a plain line about every ten seconds and at the end, for logs.

    Args:
        stream: where to.
        every: seconds between lines.
        clock: returns the time in seconds; replaced in tests.
    """

    def __init__(self, stream: TextIO, every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.every, self.clock = stream, every, clock

    @contextmanager
    def task(self, title: str, total: int, done: int = 0, unit: str = "inputs") -> Iterator[Advance]:
        """Start a task."""
        begun = said = self.clock()
        fresh = 0

        def advance() -> None:
            nonlocal said, fresh
            fresh += 1
            if self.clock() - said >= self.every:
                said = self.clock()
                self._say(title, done + fresh, total, fresh / max(said - begun, 1e-9), unit)

        yield advance
        self._say(title, done + fresh, total, fresh / max(self.clock() - begun, 1e-9), unit)

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self.stream, flush=True)

    def _say(self, title: str, done: int, total: int, rate: float, unit: str) -> None:
        left = f", {format_left((total - done) / rate)} left" if rate > 0 and done < total else ""
        speed = f", {format_rate(rate, unit)}" if rate > 0 else ""
        self.say(f"{title}: {done}/{total} {unit}{speed}{left}")


def format_left(seconds: float) -> str:
    """Print a time that is left.

    Example:
        >>> format_left(42.4), format_left(3723)
        ('42 s', '1:02:03')
    """
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_rate(rate: float, unit: str = "inputs") -> str:
    """Print a speed.

    Example:
        >>> format_rate(0.25), format_rate(12.345), format_rate(1800)
        ('0.25 inputs/s', '12.3 inputs/s', '1,800 inputs/s')
    """
    return (f"{rate:.2f}" if rate < 1 else f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}") + f" {unit}/s"


class Bar:
    """Draws a bar with units a second and the time left."""

    def __init__(self) -> None:
        self._console: Any = None

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._console is None:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
        else:
            self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def task(self, title: str, total: int, done: int = 0, unit: str = "inputs") -> Iterator[Advance]:
        """Start a task."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        begun, fresh = time.monotonic(), 0
        self._console = Console(stderr=True)
        try:
            with RichProgress(*columns, console=self._console) as bar:
                number = bar.add_task(title, total=total, completed=done, rate="")

                def advance() -> None:
                    nonlocal fresh
                    fresh += 1
                    bar.update(number, advance=1, rate=format_rate(fresh / max(time.monotonic() - begun, 1e-9), unit))

                yield advance
        finally:
            self._console = None


def for_stream(stream: TextIO | None = None, every: float = 10.0) -> Progress:
    """Return a bar when the stream (standard error by default) is a terminal, else plain lines, one in so many seconds."""
    stream = sys.stderr if stream is None else stream
    return Bar() if stream.isatty() else Lines(stream, every)


_SHOWN: ContextVar[tuple[Progress, str] | None] = ContextVar("shown", default=None)
_QUIET = 3.0
"""Seconds that a step of set-up may take in silence."""


@contextmanager
def shown_on(progress: Progress, title: str = "") -> Iterator[None]:
    """Let :func:`step` speak on a display, with a title before its words, until the context ends."""
    token = _SHOWN.set((progress, f"{title}: " if title else ""))
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def step(name: str, quiet: float = _QUIET) -> Iterator[None]:
    """Name what is being done, such as "checking bounds": said once it has taken ``quiet`` seconds, and again when it ends.

    Says nothing outside of :func:`shown_on`.
    """
    display = _SHOWN.get()
    if display is None:
        yield
        return
    progress, title = display
    begun, said = time.monotonic(), threading.Event()

    def speak() -> None:
        said.set()
        progress.say(f"{title}{name} ...")

    timer = threading.Timer(quiet, speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            progress.say(f"{title}{name}: {time.monotonic() - begun:.0f} s")
