"""The moment rules that installed plugins bring."""

from __future__ import annotations

from rsplugins.errors import PluginError
from rsplugins.host import MomentRuleDescriptor, Status, get_host
from rsplugins.moments.rules import Rule


def plugin_rules() -> dict[str, Rule]:
    """Return plugins' rules by the class name of the operator; only active plugins are loaded.

    Raises:
        PluginError: two rules for one operator, or a rule that cannot be imported.
    """
    found: dict[str, Rule] = {}
    owners: dict[str, str] = {}
    for entry in get_host().entries("moment-rule"):
        if entry.status is not Status.ACTIVE or not isinstance(entry.descriptor, MomentRuleDescriptor):
            continue
        operator = entry.descriptor.operator
        if operator in found:
            raise PluginError(
                f"Two moment rules for {operator}: the {owners[operator]} and the {entry.label}.",
                fix="Uninstall one of them, or name the plugins you want in RSPLUGINS_LOAD.",
            )
        found[operator], owners[operator] = entry.load(), entry.label
    return found
