"""What a plugin must pass to be admitted: import, API version, hook names, hook signatures, descriptors."""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from rsplugins.errors import did_you_mean
from rsplugins.host.descriptors import API_VERSION, Descriptor
from rsplugins.host.entries import describe
from rsplugins.host.hookspecs import RETURNS


class RefusedError(Exception):
    """A plugin is not admitted.

    Args:
        reason: what is wrong with it.
        fix: what its author should do.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


def admit(manager: pluggy.PluginManager, point: EntryPoint, key: str) -> list[Descriptor]:
    """Import the plugin of an entry point, register it as ``key`` and return the descriptors that its hooks give.

    Raises:
        RefusedError: something is wrong with it. The plugin may be registered then: the caller rolls back.
    """
    try:
        plugin = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RefusedError(f"the import of {point.value!r} raised {describe(error)}", _import_fix(error, point)) from error
    _check_api(plugin, point)
    _check_hook_names(manager, plugin)
    try:
        manager.register(plugin, name=key)
    except pluggy.PluginValidationError as error:
        reason = f"a hook has the wrong signature: {' '.join(str(error).split())}"
        raise RefusedError(reason, "Hooks take no argument: `def rsplugins_certifiers():`.") from error
    return _descriptors(manager, plugin)


def _import_fix(error: BaseException, point: EntryPoint) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        if point.value.partition(":")[0].startswith(error.name):
            return "Correct the entry point: it names a module that the distribution does not hold."
        return (
            f"Install {error.name}. A plugin module should import nothing heavy: import {error.name} in the factory's module and "
            "name its distribution in the descriptor's `requires`."
        )
    if isinstance(error, SystemExit):
        return "Do not call sys.exit() at import; protect scripts with `if __name__ == '__main__':`."
    return f"Make `python -c 'import {point.value.partition(':')[0]}'` work."


def _check_api(plugin: Any, point: EntryPoint) -> None:
    module = sys.modules.get(point.value.partition(":")[0])
    version = getattr(plugin, "RSPLUGINS_API", getattr(module, "RSPLUGINS_API", 1))
    if version == API_VERSION:
        return
    newer = isinstance(version, int) and version > API_VERSION
    raise RefusedError(
        f"it was written for version {version!r} of the plugin API, and this rsplugins has version {API_VERSION}",
        "Update the host: pip install --upgrade rsplugins."
        if newer
        else f"Port it: set RSPLUGINS_API = {API_VERSION} once its hooks and descriptors are those of version {API_VERSION}.",
    )


def _check_hook_names(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Refuse near misses before registration: pluggy keeps silent about a hook that nobody calls."""
    found = False
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        hook = (options["specname"] if options else None) or name
        if options is not None and hook in RETURNS:
            found = True
        elif options is not None and not options.get("optionalhook"):
            raise RefusedError(f"there is no hook named {hook!r}.{did_you_mean(hook, RETURNS)}", _HOOK_NAMES)
        elif options is None and name.startswith("rsplugins_"):
            _check_unmarked(name, inspect.getattr_static(plugin, name, None))
    if not found:
        hints = [hint for name in dir(plugin) if not name.startswith("__") and (hint := did_you_mean(name, RETURNS))]
        raise RefusedError(f"it implements no hook.{(hints or [''])[0]}", _HOOK_NAMES)


_HOOK_NAMES = f"The hooks are {', '.join(RETURNS)}."


def _check_unmarked(name: str, value: object) -> None:
    if name in RETURNS:
        raise RefusedError(f"{name} is not marked as a hook implementation", "Write @rsplugins.hookimpl above it.")
    if inspect.isroutine(value):  # a module `rsplugins_something` that it imported is nobody's mistake
        raise RefusedError(f"there is no hook named {name!r}.{did_you_mean(name, RETURNS)}", _HOOK_NAMES)


def _descriptors(manager: pluggy.PluginManager, plugin: Any) -> list[Descriptor]:
    """Call the plugin's hooks one by one, so that what goes wrong has an owner; other plugins' hooks are not called."""
    found: dict[tuple[str, str], Descriptor] = {}
    for hook, expected in RETURNS.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            for descriptor in _call(hook, implementation.function, expected):
                if (descriptor.kind, descriptor.name) in found:
                    reason = f"it brings two things of kind {descriptor.kind} named {descriptor.name!r}"
                    raise RefusedError(reason, "Rename one of them.")
                found[descriptor.kind, descriptor.name] = descriptor
    return list(found.values())


def _call(hook: str, function: Any, expected: type[Descriptor]) -> list[Descriptor]:
    try:
        value = function()
    except KeyboardInterrupt:
        raise
    except ValueError as error:  # what descriptors raise about a malformed field
        raise RefusedError(f"{hook} gave a malformed descriptor: {describe(error)}", "Correct that field.") from error
    except BaseException as error:
        raise RefusedError(f"{hook} raised {describe(error)}", f"{hook} must return descriptors and do nothing else.") from error
    fix = f"{hook} must return a list of {expected.__name__}."
    if not isinstance(value, (list, tuple)):
        raise RefusedError(f"{hook} returned {type(value).__name__}, not a list", fix)
    for item in value:
        if not isinstance(item, expected):
            raise RefusedError(f"{hook} returned a list that holds {item!r}", fix)
    return list(value)
