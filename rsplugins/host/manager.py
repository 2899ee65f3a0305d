"""The host: one pluggy manager, every installed plugin admitted or refused on its own."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import EntryPoint

import pluggy

from rsplugins.errors import UnknownNameError, warn
from rsplugins.host.admission import RefusedError, admit
from rsplugins.host.descriptors import Descriptor
from rsplugins.host.entries import Entry, Status, describe
from rsplugins.host.hookspecs import PROJECT, RETURNS, HookSpecs
from rsplugins.host.requirements import install_line, missing_text, unmet
from rsplugins.provenance import version as package_version

GROUP = "rsplugins"
BUILTIN = "rsplugins.builtin"
KINDS = (*(descriptor.kind for descriptor in RETURNS.values()), Descriptor.kind)


class Host:
    """All installed plugins, admitted one by one.

    Plugins are the entry points of the group ``rsplugins``, and the built-in one also where a checkout runs without being
    installed. Each is imported, checked and asked for its descriptors on its own;
    one that fails is unregistered again, is listed as failed, and is one :class:`RspluginsWarning`.

    Two distributions that claim the same name of the same kind make that name unusable until one of them goes, and the error
    names both; neither wins silently. Only a built-in name keeps working: installing a stranger cannot change or break it.

    Args:
        strict: raise a :class:`PluginError` for the first plugin that fails instead of going on without it.
        only: entry-point names of the plugins to load; empty means all. The built-in plugin is called ``rsplugins`` and is
            subject to this like any other.

    Raises:
        PluginError: in strict mode, for a plugin that failed or a name that two distributions claim.
        UnknownNameError: when ``only`` names a plugin that is not installed.
    """

    def __init__(self, *, strict: bool = False, only: Collection[str] = ()) -> None:
        self.strict = strict
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        entries = [entry for plugin in _installed(only) for entry in self._admit(*plugin)]
        self._entries = sorted(self._without_conflicts(entries), key=lambda entry: KINDS.index(entry.kind))
        for entry in self._entries:
            if entry.status is Status.FAILED:
                warn(f"The {entry.label} failed: {entry.reason} `rsplugins plugins list` says what to do.")

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return what the plugins bring, built-in entries first within each kind, and the plugins that failed last.

        Args:
            kind: ``"certifier"``, ``"model-source"``, ``"dataset"``, ``"bound-operator"``, ``"training-hook"``, ``"plugin"``
                (those that failed before they brought anything), or None for all.

        Raises:
            UnknownNameError: for another kind.
        """
        if kind is not None and kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
        return [entry for entry in self._entries if kind is None or entry.kind == kind]

    def find(self, kind: str, name: str) -> Entry:
        """Return the entry with this kind and name, active or not; ``load()`` says why one that is not cannot be used.

        Raises:
            UnknownNameError: with a did-you-mean, and with the plugins that failed and might have brought the name.
        """
        candidates = [entry for entry in self.entries(kind) if entry.name == name]
        if candidates:
            return min(candidates, key=lambda entry: list(Status).index(entry.status))
        failed = [f"{entry.name!r} ({entry.distribution} {entry.version})" for entry in self.entries("plugin")]
        known = {entry.name for entry in self.entries(kind) if entry.status is not Status.FAILED}
        fix = ""
        if failed:
            use = f"Use one of: {', '.join(sorted(known))}. " if known else ""
            fix = f"{use}It may belong to a plugin that failed: {', '.join(failed)}; see `rsplugins plugins list`."
        raise UnknownNameError(kind, name, known, fix=fix)

    def _admit(self, point: EntryPoint, distribution: str, version: str) -> list[Entry]:
        blank = Entry(name=point.name, kind=Descriptor.kind, plugin=point.name, distribution=distribution, version=version)
        key = f"{distribution}:{point.name}"
        try:
            return [_entry(blank, descriptor) for descriptor in admit(self._manager, point, key)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self._manager.has_plugin(key):
                self._manager.unregister(name=key)
            reason, fix = (error.reason, error.fix) if isinstance(error, RefusedError) else (describe(error), "Report it.")
            fix += f" If {distribution} is not yours: pip install --upgrade {distribution}, or pip uninstall {distribution}."
            failed = replace(blank, status=Status.FAILED, reason=_sentence(reason), fix=fix)
            if self.strict:
                raise failed.error() from error
            return [failed]

    def _without_conflicts(self, entries: list[Entry]) -> list[Entry]:
        """Mark every entry whose name another distribution claims too as failed, except a built-in one."""
        claims: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in entries:
            claims[entry.kind, entry.name].append(entry)
        return [self._judged(entry, claims[entry.kind, entry.name]) for entry in entries]

    def _judged(self, entry: Entry, claims: list[Entry]) -> Entry:
        if len(claims) == 1 or entry.distribution == PROJECT or entry.descriptor is None:
            return entry
        owners = " and by ".join(f"{claim.distribution} {claim.version}" for claim in claims)
        strangers = [claim for claim in claims if claim.distribution != PROJECT]
        outcome = "neither may win silently" if strangers == claims else "the built-in one keeps working"
        choices = " or ".join(sorted({f"`pip uninstall {claim.distribution}`" for claim in strangers}))
        judged = replace(
            entry,
            status=Status.FAILED,
            reason=f"The {entry.kind} name {entry.name!r} is claimed by {owners}; {outcome}.",
            fix=f"Rename it in one of them, run {choices}, or name the plugins you want in RSPLUGINS_LOAD.",
        )
        if self.strict:
            raise judged.error()
        return judged


@functools.cache
def get_host() -> Host:
    """Return the host of this process, loaded at the first call.

    Environment:
        RSPLUGINS_STRICT: ``1`` raises for a broken plugin instead of going on without it.
        RSPLUGINS_LOAD: comma-separated entry-point names; only these plugins are loaded. The built-in plugin is ``rsplugins`` and
            must be named too where it is wanted: ``RSPLUGINS_LOAD=rsplugins,mine``.

    Raises:
        PluginError, UnknownNameError: as :class:`Host`.
    """
    only = [name.strip() for name in os.environ.get("RSPLUGINS_LOAD", "").split(",") if name.strip()]
    return Host(strict=os.environ.get("RSPLUGINS_STRICT", "") not in ("", "0"), only=only)


def _installed(only: Collection[str]) -> list[tuple[EntryPoint, str, str]]:
    """Return (entry point, distribution, version) of the plugins to load, the built-in one first."""
    points = list(importlib.metadata.entry_points(group=GROUP))
    if not any(point.value == BUILTIN for point in points):
        # Run from a checkout on a machine where nothing can be installed, as a lent GPU machine is.
        points.append(EntryPoint(name="rsplugins", value=BUILTIN, group=GROUP))
    known = sorted({point.name for point in points})
    for name in only:
        if name not in known:
            fix = f"RSPLUGINS_LOAD may name the installed plugins: {', '.join(known)}."
            raise UnknownNameError("plugin", name, known, fix=fix)
    chosen = [(point, *_origin(point)) for point in points if not only or point.name in only]
    return sorted(chosen, key=lambda found: (found[0].value != BUILTIN, found[0].name, found[1]))


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Distribution and version; a METADATA file that is missing or broken must not hide the plugin."""
    if point.value == BUILTIN:
        return "rsplugins", package_version()
    try:
        metadata = point.dist.metadata if point.dist is not None else {"Name": "", "Version": ""}
        return str(metadata["Name"] or point.name), str(metadata["Version"] or "(unknown version)")
    except Exception:
        return point.name, "(unknown version)"


def _entry(blank: Entry, descriptor: Descriptor) -> Entry:
    entry = replace(blank, name=descriptor.name, kind=descriptor.kind, descriptor=descriptor)
    try:
        needs = unmet(descriptor.requires)
    except ValueError as error:
        reason = f"{descriptor.kind} {descriptor.name!r} is malformed: in `requires`, {' '.join(str(error).split())}"
        raise RefusedError(reason, 'Write requirements such as "auto-LiRPA>=0.3".') from error
    if not needs:
        return entry
    return replace(entry, status=Status.UNAVAILABLE, reason=_sentence(missing_text(needs)), fix=install_line(needs))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."
