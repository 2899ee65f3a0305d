"""Errors that say what happened, the likely cause and the next step.

Every error this package raises on purpose derives from :class:`RspluginsError`, so that one ``except`` at the command line can
print it without a traceback, and the three parts are kept apart so that a machine can read them too.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class RspluginsError(Exception):
    """An error with its cause and its fix.

    Args:
        what: what happened, one sentence without a full stop at the end being required.
        cause: the likely reason.
        fix: the next step, as concrete as possible: a command, an argument.

    Example:
        >>> print(RspluginsError("It broke.", cause="A screw was loose.", fix="Tighten it."))
        It broke.
          likely cause: A screw was loose.
          next step: Tighten it.
    """

    exit_code = 1

    def __init__(self, what: str, *, cause: str = "", fix: str = "") -> None:
        self.what, self.cause, self.fix = what, cause, fix
        lines = [what]
        if cause:
            lines.append(f"  likely cause: {cause}")
        if fix:
            lines.append(f"  next step: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.cause, self.fix)


def _rebuild(kind: type[RspluginsError], what: str, cause: str, fix: str) -> RspluginsError:
    error = kind.__new__(kind)
    RspluginsError.__init__(error, what, cause=cause, fix=fix)
    return error


class RspluginsWarning(UserWarning):
    """Something was survived (a broken plugin, a torn last line); the text says what and what to do."""


class UsageError(RspluginsError):
    """The call or the command line cannot be carried out as written."""

    exit_code = 2


class ParameterError(UsageError):
    """A parameter has the wrong name, type or range."""


class UnknownNameError(UsageError):
    """A name that nobody registered; carries a did-you-mean.

    Args:
        kind: what was looked for, such as ``"certifier"``.
        name: the name as given.
        known: the names that exist.
        fix: replaces the default next step, which lists the known names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, fix: str = "") -> None:
        known = sorted(known)
        super().__init__(
            f"There is no {kind} named {name!r}.{did_you_mean(name, known)}",
            fix=fix or (f"Use one of: {', '.join(known)}." if known else f"Install a plugin that brings a {kind}."),
        )


class ImpossibleBudgetError(ParameterError):
    """No outcome of the sampling could certify anything; the fix names the smallest budget that could."""


class InputValueError(UsageError):
    """Inputs outside [0, 1], not finite, or of the wrong shape or dtype."""


class UnreadableInputError(InputValueError):
    """One stored input that cannot be read; a run records it as failed and goes on with the others."""


class OutputValueError(RspluginsError):
    """A model returned logits that are not finite, or of the wrong shape."""


class CheckpointError(RspluginsError):
    """A checkpoint that is missing, damaged, not what it says, or does not fit the architecture."""


class PackageMissingError(CheckpointError):
    """The weights lie in a package that is not installed."""


class DataNotFoundError(UsageError):
    """A data set that is not where it was looked for."""


class RunError(RspluginsError):
    """A run directory that is damaged, incomplete, or belongs to other parameters."""


class PluginError(RspluginsError):
    """A plugin that failed to load, to register, or while it worked; names the distribution and its version."""


class PluginUnavailableError(UsageError):
    """A plugin whose optional dependencies are missing; the fix is the line that installs them."""


def warn(text: str) -> None:
    """Issue a :class:`RspluginsWarning` that points to the line outside of this package from which it was called."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "rsplugins",
        "contextlib",
        "torch",
    ):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, RspluginsWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` when a known name is close, otherwise an empty string.

    Example:
        >>> did_you_mean("gausian", ["gaussian", "ibp"])
        " Did you mean 'gaussian'?"
        >>> did_you_mean("qqq", ["gaussian"])
        ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
