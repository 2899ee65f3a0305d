"""The bound operators that installed plugins bring, as the operators of one network."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rsplugins.certificate import Guarantee
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.errors import PluginError, UnknownNameError
from rsplugins.host import BoundOperatorDescriptor, Entry, Status, get_host, guard
from rsplugins.host.hookspecs import PROJECT
from rsplugins.machine.device import is_out_of_memory

ETB = ("etb-gemm", "etb-matmul", "etb-conv")
"""Names of the operators of expected tight bounds. ESTIMATE."""
SOUND_ETB = ("sound-etb-gemm", "sound-etb-matmul", "sound-etb-conv")
"""Names of those of sound expected tight bounds."""
PASS_THROUGH = ("sound-etb-pass-gemm", "sound-etb-pass-matmul", "sound-etb-pass-conv")
"""Names of those in which unstable neurons are passed through."""


class PluginOperators(Mapping[str, type]):
    """Bound classes by ONNX operator, for one network; a plugin is imported when the network's trace meets its operator.

    Args:
        named: names of operators to use whatever else there is for what they bound.
        estimates: whether operators that bound in expectation only are taken as well.
        exclude: names of operators that are left alone.

    Raises:
        UnknownNameError: a name that no plugin brings.
    """

    def __init__(self, named: Sequence[str] = (), *, estimates: bool = False, exclude: Sequence[str] = ()) -> None:
        host = get_host()
        known = [entry for entry in host.entries("bound-operator") if _operator(entry)]
        names = {entry.name for entry in known}
        for name in exclude:
            if name not in names:
                raise UnknownNameError("bound-operator", name, names)
        self._known, self._estimates, self._excluded = known, estimates, frozenset(exclude)
        self._named = {_operator(entry): entry for entry in (host.find("bound-operator", name) for name in named)}
        self._classes: dict[str, type] = {}
        self._used: dict[str, Entry] = {}

    def __getitem__(self, operator: str) -> type:
        """Import the class that bounds an operator.

        Raises:
            PluginError: two plugins claim it, or the one that does cannot be imported or brings no Bound class.
        """
        if operator not in self._classes:
            entry = self._entry(operator)
            self._classes[operator] = bound_class(entry)
            self._used[operator] = entry
        return self._classes[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._named, *(_operator(entry) for entry in self._known if self._takes(entry))]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, operator: object) -> bool:
        return any(operator == each for each in self)

    @property
    def took_part(self) -> list[str]:
        """What the network is bounded with, as records name it; this package's own without a version, which they have."""
        return [f"{operator}: {_said(entry)}" for operator, entry in sorted(self._used.items())]

    @property
    def strangers(self) -> list[str]:
        """Those of :attr:`took_part` that are not this package's own."""
        used = sorted(self._used.items())
        return [f"{operator}: {_said(entry)}" for operator, entry in used if entry.distribution != PROJECT]

    def hint(self, operator: str) -> str:
        """Return why an operator that plugins bring is not taken, in a sentence; empty when none brings it."""
        for entry in self._known:
            if _operator(entry) != operator or not entry.descriptor or not getattr(entry.descriptor, "default", False):
                continue
            if entry.status is not Status.ACTIVE:
                return f"The {entry.label} brings it and is {entry.status}: {entry.reason} {entry.fix}"
            if entry.name in self._excluded:
                return f"The {entry.label} brings it and is excluded."
            return f"The {entry.label} brings it, as an estimate, which no certifier with a guarantee takes; method etb does."
        return ""

    def _takes(self, entry: Entry) -> bool:
        descriptor = entry.descriptor
        if not isinstance(descriptor, BoundOperatorDescriptor) or not descriptor.default or entry.name in self._excluded:
            return False
        if entry.distribution == PROJECT and _release_has(descriptor.operator):
            return False
        return entry.status is Status.ACTIVE and (self._estimates or descriptor.guarantee is Guarantee.DETERMINISTIC)

    def _entry(self, operator: str) -> Entry:
        if operator in self._named:
            return self._named[operator]
        found = [entry for entry in self._known if _operator(entry) == operator and self._takes(entry)]
        if not found:
            raise KeyError(operator)
        if len(found) > 1:
            raise PluginError(
                f"Two plugins bring bounds of {operator}: {' and '.join(f'the {entry.label}' for entry in found)}.",
                cause="which of them a certificate rests on must not depend on the order of installation.",
                fix=f"Leave one out with exclude={found[-1].name}, uninstall it, or name the plugins you want in RSPLUGINS_LOAD.",
            )
        return found[0]


def _release_has(operator: str) -> bool:
    """Whether the installed auto-LiRPA bounds an operator by itself: what this package brings for it stands back."""
    bridge_auto_lirpa()
    operators = importlib.import_module("auto_LiRPA.bound_ops")
    known = importlib.import_module("auto_LiRPA.bound_op_map").bound_op_map
    return operator in known or hasattr(operators, f"Bound{operator.removeprefix('onnx::')}")


def _operator(entry: Entry) -> str:
    return entry.descriptor.operator if isinstance(entry.descriptor, BoundOperatorDescriptor) else ""


def _said(entry: Entry) -> str:
    return f"{entry.name} ({entry.distribution}{'' if entry.distribution == PROJECT else f' {entry.version}'})"


def bound_class(entry: Entry) -> type:
    """Import an operator; that of a stranger is wrapped, so that what it raises names its plugin."""
    bridge_auto_lirpa()
    from auto_LiRPA.bound_ops import Bound

    factory = entry.load()
    if not (isinstance(factory, type) and issubclass(factory, Bound)):
        raise PluginError(
            f"The {entry.label} is no bound operator: its factory is {factory!r}.",
            fix="Derive it from auto_LiRPA.bound_ops.Bound, or from BoundActivation beside it.",
        )
    if entry.distribution == PROJECT:
        return factory
    estimate = getattr(entry.descriptor, "guarantee", None) is not Guarantee.DETERMINISTIC
    body: dict[str, Any] = {name: _blamed(factory, name, entry) for name in _METHODS if hasattr(factory, name)}
    return type(factory.__name__, (factory,), {**body, "__module__": factory.__module__, "estimate": estimate, "stranger": True})


_METHODS = ("__init__", "forward", "interval_propagate", "bound_backward", "interval_rounding", "linear_rounding")


def _blamed(factory: type, name: str, entry: Entry) -> Callable[..., Any]:
    method = getattr(factory, name)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except NotImplementedError:  # what the operator does not know: another method may ask less of it
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            with guard(entry, f"in {name} of {factory.__name__}"):
                raise

    return call
