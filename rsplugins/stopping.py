"""Ending on a signal with what was done kept and said: the interrupt key (SIGINT), and SIGTERM, which schedulers send.

A SIGTERM is passed on as the interrupt key is, so that whatever lets the one through lets the other through. Who keeps something
says so in :func:`keeping`; the command prints it as it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""128 and the number of the signal, as shells have it."""

_notes: list[str] = []
_ended_by: list[int] = []
_commands: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def keeping(text: Callable[[], str]) -> Iterator[None]:
    """Note what is kept, and how to go on from it, when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        note(text())
        raise


def note(text: str) -> bool:
    """Note what is kept, and return whether a command is running, which will say it."""
    _notes.append(text)
    return bool(_commands)


def ended() -> tuple[int, list[str]]:
    """Return which signal ended this process's work (SIGINT unless a SIGTERM came), and what is kept."""
    return (_ended_by[-1] if _ended_by else signal.SIGINT), list(_notes)


@contextmanager
def terminable() -> Iterator[None]:
    """Turn a SIGTERM in a command into :class:`Terminated`; in the main thread alone, where Python allows a handler."""
    _notes.clear()
    _ended_by.clear()
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        _leave_if_forked(owner, number)
        _end(number)

    _commands.append(owner)
    try:
        with _handling(terminate, signal.SIGTERM):
            yield
    finally:
        _commands.pop()


class Stop:
    """A block that ends at a moment of its own choosing: a signal is only noted, and a second one ends it at once.

    Attributes:
        signal: the one that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._owner = os.getpid()

    @contextmanager
    def handling(self) -> Iterator[Stop]:
        """Note signals in the block, where nobody else handles them already."""
        with _handling(self._note, signal.SIGTERM, signal.SIGINT):
            yield self

    def now(self) -> NoReturn:
        """End the work, as the signal that came would have done."""
        if self.signal == signal.SIGTERM and not _commands:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        _end(signal.SIGTERM if self.signal is None else self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner and number == signal.SIGINT:
            return  # a terminal sends it to the processes that read ahead as well, which the owner ends itself
        _leave_if_forked(self._owner, number)
        if self.signal is not None:
            _end(number)
        self.signal = number


def _end(number: int) -> NoReturn:
    _ended_by.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _leave_if_forked(owner: int, number: int) -> None:
    """Let a process that was forked from the owner, and has its handlers, die of a signal as it would without them."""
    if os.getpid() != owner:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            known = signal.getsignal(number)
            if known in ours or getattr(known, "__module__", "") == __name__:
                before[number] = known
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
