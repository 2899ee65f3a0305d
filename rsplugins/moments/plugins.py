"""The moment rules that installed plugins bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rsplugins.errors import PluginError
from rsplugins.host import Entry, MomentRuleDescriptor, Status, get_host
from rsplugins.moments.rules import Rule


class PluginRules(Mapping[str, Rule]):
    """Rules by the class name of the operator, each imported when a network has its operator.

    A rule for an operator that auto-LiRPA does not have is reached where the rule object has an attribute ``forward``, the
    function of the operator itself: ``(node, *inputs) -> Tensor``.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._rules: dict[str, Rule] = {}
        for entry in get_host().entries("moment-rule"):
            if entry.status is Status.ACTIVE and isinstance(entry.descriptor, MomentRuleDescriptor):
                operator = entry.descriptor.operator
                if operator in self._entries:
                    raise PluginError(
                        f"Two moment rules for {operator}: the {self._entries[operator].label} and the {entry.label}.",
                        fix="Uninstall one of them, or name the plugins you want in RSPLUGINS_LOAD.",
                    )
                self._entries[operator] = entry

    def __getitem__(self, operator: str) -> Rule:
        """Import the rule for an operator.

        Raises:
            PluginError: it cannot be imported or called.
        """
        if operator not in self._rules:
            self._rules[operator] = _load(self._entries[operator])
        return self._rules[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def took_part(self) -> list[str]:
        """The rules that were imported, as records name them."""
        entries = ((operator, self._entries[operator]) for operator in sorted(self._rules))
        return [f"{operator}: {entry.name} ({entry.distribution} {entry.version})" for operator, entry in entries]


def _load(entry: Entry) -> Rule:
    rule: Rule = entry.load()
    if not callable(rule):
        raise PluginError(f"The {entry.label} is no rule: its factory is {rule!r}.", fix="Make it a function of a Site.")
    return rule


def plugin_rules() -> PluginRules:
    """Return plugins' rules by the class name of the operator; nothing is imported yet.

    Raises:
        PluginError: two rules for one operator.
    """
    return PluginRules()
