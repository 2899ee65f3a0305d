"""What a contract check says: passed, failed with the reason, measured, or left out with the reason. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rsplugins.errors import RspluginsError
from rsplugins.host.entries import describe

Status = Literal["passed", "failed", "measured", "skipped"]


class BrokenContractError(AssertionError):
    """A plugin does not keep what it promises; the text says which promise and how that was seen."""


class NotChecked(Exception):  # noqa: N818 -- not an error: the check does not apply
    """A check does not apply to this plugin; the text says why."""


@dataclass(frozen=True)
class Check:
    """One check of a contract.

    Attributes:
        name: short, unique within a contract.
        run: does it, and returns what was seen in a few words; a text that starts with ``"measured: "`` is a number, no verdict.
    """

    name: str
    run: Callable[[], str]

    def outcome(self) -> Outcome:
        """Run the check and report what happened, whatever the plugin does."""
        try:
            detail = self.run()
        except NotChecked as reason:
            return Outcome(self.name, "skipped", str(reason))
        except BrokenContractError as error:
            return Outcome(self.name, "failed", str(error))
        except RspluginsError as error:
            return Outcome(self.name, "failed", str(error))
        except Exception as error:  # a plugin may raise anything
            return Outcome(self.name, "failed", describe(error))
        measured = detail.startswith("measured: ")
        return Outcome(self.name, "measured" if measured else "passed", detail.removeprefix("measured: "))


@dataclass(frozen=True)
class Outcome:
    """What one check said.

    Attributes:
        name: of the check.
        status: ``"measured"`` is a number without a verdict, as for an ESTIMATE.
        detail: what was seen, or why it failed.
    """

    name: str
    status: Status
    detail: str


def require(good: bool, broken: str) -> None:
    """Raise :class:`BrokenContractError` with a text unless ``good``."""
    if not good:
        raise BrokenContractError(broken)
