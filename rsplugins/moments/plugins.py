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
        self._entries: dict[str, list[Entry]] = {}
        self._rules: dict[str, Rule] = {}
        for entry in get_host().entries("moment-rule"):
            if entry.status is Status.ACTIVE and isinstance(entry.descriptor, MomentRuleDescriptor):
                self._entries.setdefault(entry.descriptor.operator, []).append(entry)

    def __getitem__(self, operator: str) -> Rule:
        """Import the rule for an operator.

        Raises:
            PluginError: two plugins bring one, or it cannot be imported or called.
        """
        if operator not in self._rules:
            self._rules[operator] = self._load(operator, self._entries[operator])
        return self._rules[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def took_part(self) -> list[str]:
        """The rules that were imported, as records name them."""
        entries = ((operator, self._entries[operator][0]) for operator in sorted(self._rules))
        return [f"{operator}: {entry.name} ({entry.distribution} {entry.version})" for operator, entry in entries]

    def _load(self, operator: str, entries: list[Entry]) -> Rule:
        if len(entries) > 1:
            raise PluginError(
                f"Two plugins bring moment rules for {operator}: {' and '.join(f'the {entry.label}' for entry in entries)}.",
                fix="Uninstall one of them, or name the plugins you want in RSPLUGINS_LOAD.",
            )
        (entry,) = entries
        rule: Rule = entry.load()
        if not callable(rule):
            raise PluginError(f"The {entry.label} is no rule: its factory is {rule!r}.", fix="Make it a function of a Site.")
        return rule


def plugin_rules() -> PluginRules:
    """Return plugins' rules by the class name of the operator; nothing is imported yet."""
    return PluginRules()
