"""One line of the plugin list, and how plugin code is imported and run without taking the rest down."""

from __future__ import annotations

import importlib
import operator
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rsplugins.errors import PluginError, PluginUnavailableError, RspluginsError
from rsplugins.host.descriptors import CertifierDescriptor, Descriptor
from rsplugins.host.hookspecs import PROJECT


class Status(str, Enum):
    """Whether an entry can be used."""

    ACTIVE = "active"
    UNAVAILABLE = "unavailable"
    """An optional dependency is missing; ``fix`` is the line that installs it."""
    FAILED = "failed"
    """The plugin is broken; ``reason`` says how."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Entry:
    """One thing that an installed plugin brings, or one plugin that brings nothing because it failed.

    Attributes:
        name: the descriptor's name; for a plugin that failed before it gave descriptors, its entry-point name.
        kind: the descriptor's kind, or ``"plugin"`` for a plugin that failed.
        plugin: the entry-point name of the plugin.
        distribution: the installed distribution that brings it.
        version: the version of that distribution.
        status: active, unavailable or failed.
        reason: why it is not active; empty when it is.
        fix: what to do about it; for an unavailable entry the exact line that installs what is missing.
        descriptor: what the plugin handed over; None for a plugin that failed.
    """

    name: str
    kind: str
    plugin: str
    distribution: str
    version: str
    status: Status = Status.ACTIVE
    reason: str = ""
    fix: str = ""
    descriptor: Descriptor | None = None

    @property
    def label(self) -> str:
        """Kind, name, distribution and version, as error messages name it."""
        return f"{self.kind} {self.name!r} ({self.distribution} {self.version})"

    def error(self) -> RspluginsError:
        """Return, without raising it, the error that says why this entry cannot be used and what to do."""
        if self.status is Status.UNAVAILABLE:
            return PluginUnavailableError(f"The {self.label} is unavailable.", cause=self.reason, fix=self.fix)
        return PluginError(f"The {self.label} failed to load.", cause=self.reason, fix=self.fix)

    def load(self) -> Any:
        """Import and return the factory.

        Raises:
            PluginUnavailableError: an optional dependency is missing.
            PluginError: the plugin failed earlier, or its factory cannot be imported.
        """
        return self._load("factory")

    def load_claim(self) -> Any:
        """Import and return a certifier's torch-free claim function; needs none of the optional dependencies.

        Raises:
            PluginError: the plugin failed earlier, is not a certifier, or its claim function cannot be imported.
        """
        if self.descriptor is not None and not isinstance(self.descriptor, CertifierDescriptor):
            raise PluginError(f"The {self.label} has no claim function.", fix="Ask for a certifier.")
        return self._load("claim")

    def _load(self, field: str) -> Any:
        # Evidence can be re-read where the certifier itself cannot run: the claim function is pure.
        usable = self.status is Status.ACTIVE or (field == "claim" and self.status is Status.UNAVAILABLE)
        if self.descriptor is None or not usable:
            raise self.error()
        reference: str = getattr(self.descriptor, field)
        module, _, attribute = reference.partition(":")
        with guard(self, f"while its {field} {reference!r} was imported"):
            return operator.attrgetter(attribute)(importlib.import_module(module))


@contextmanager
def guard(entry: Entry, doing: str = "while it worked") -> Iterator[None]:
    """Turn whatever a plugin's code raises in the block into a :class:`PluginError` that names the plugin.

    The original exception stays chained. Errors of this package pass unchanged, and so do the interrupt key and the closing of a
    generator. SystemExit does not: a plugin must not end a night's run of the others.

    Args:
        entry: whose code runs in the block.
        doing: completes "The certifier 'x' (x 1.0) failed ...".

    Raises:
        PluginError: with the exception's type, text and place as its cause.
    """
    try:
        yield
    except (RspluginsError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        fix = f"Go on without it, or try a newer one: pip install --upgrade {entry.distribution}; then report it to its authors."
        if entry.distribution == PROJECT:
            fix = f"Go on without it, and report it to the authors of {PROJECT} with what `rsplugins doctor` prints."
        raise PluginError(f"The {entry.label} failed {doing}.", cause=describe(error), fix=fix) from error


def describe(error: BaseException) -> str:
    """Return type, text and place of an exception in one line, whatever the exception does when asked for its text."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be shown)"
    place = "" if isinstance(error, SyntaxError) else _place(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _place(error: BaseException) -> str:
    """Where plugin code raised it; the frames of the host and of the import machinery say nothing."""
    own = str(Path(__file__).parent)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not (file.startswith((own, "<")) or "importlib" in Path(file).parts):
            return f" ({file}, line {line})"
    return ""
