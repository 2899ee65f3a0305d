"""Every argument of every call that has a Lipschitz rule, from PyTorch's own schemas, as small networks around one call."""

import inspect
import itertools
import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from rsplugins.lipschitz.tables import FUNCTIONS, METHODS, MODULES
from tests.lipschitz.closed_values import BASES, INPUT, MADE, PLAIN, VALUES, Moving


@dataclass(frozen=True)
class Target:
    """A call that has a rule: ``kind`` is function, method or module."""

    kind: str
    key: object

    @property
    def name(self):
        return self.key if self.kind == "method" else self.key.__name__

    @property
    def base(self):
        """The name that the tables above know it by."""
        if self.kind == "function" and self.key is torch.split:
            return "split(function)"
        if self.key in _DISPATCHED:
            return _DISPATCHED[self.key]
        return self.name if self.kind == "module" else self.name.rstrip("_")

    @property
    def writes(self):
        """Whether this is the form that writes in place."""
        return self.name.endswith("_") or self.name in ("iadd", "isub", "imul", "itruediv")

    @property
    def by_operator(self):
        return self.kind == "function" and getattr(self.key, "__module__", "") == "_operator"

    def __str__(self):
        home = getattr(self.key, "__module__", "") or ""
        prefix = {"method": "Tensor.", "module": "nn."}.get(self.kind) or f"{'F' if 'functional' in home else home or 'torch'}."
        return f"{prefix}{self.base if self.key in _DISPATCHED else self.name}"


_DISPATCHED = {
    getattr(F, f"{kind}_pool{d}d"): f"{kind}_pool{d}d" for kind in ("max", "adaptive_max") for d in (1, 2, 3)
}  # torch names all of them "fn"

TARGETS = [
    *(Target("function", key) for key in FUNCTIONS),
    *(Target("method", key) for key in METHODS),
    *(Target("module", key) for key in MODULES),
]


BY_CHECK = {target for target in TARGETS if target.by_operator}
"""Calls whose writing is not seen in the graph: torch.fx takes ``y += 1`` for ``y = y + 1``. The check that the graph computes
what the network does refuses these."""


def schema(target):
    """The names of a call's arguments as PyTorch has them, in order, by overload; ``*`` stands before those by keyword alone."""
    if target.kind == "module":
        parameters = inspect.signature(target.key.__init__).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return [[name for name in names if name not in ("device", "dtype")]]
    function = getattr(F, f"{_DISPATCHED[target.key]}_with_indices") if target.key in _DISPATCHED else target.key
    if target.by_operator:
        names = ["input", "index" if target.name == "getitem" else "other"]
        return [names[: len(inspect.signature(function).parameters)]]
    if target.kind == "function" and inspect.isfunction(function):
        return [list(inspect.signature(function).parameters)]
    return _aten(target.name, methods=target.kind == "method")


def _aten(name, methods):
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return [["input", "*", "memory_format"]]  # float() and double()
    orders = []
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if not str(arguments[0].type).startswith(("Tensor", "List[Tensor]")):
            continue  # of torch.jit
        plain = ["input" if a.name == "self" else a.name for a in arguments if not a.kwarg_only]
        orders.append([*plain, "*", *(a.name for a in arguments if a.kwarg_only and not (methods and a.name == "out"))])
    return orders


@dataclass
class Case:
    """One way to call a target."""

    target: Target
    shape: tuple
    args: list
    kwargs: dict
    given: dict
    harness: str = "plain"
    layer: nn.Module | None = field(default=None, repr=False)

    def __str__(self):
        said = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        if self.layer is not None:
            said = [repr(self.layer)]
        return f"{self.target}({', '.join(said)}) of {self.shape}, {self.harness}".replace("\n", "")

    def call(self, y, layer):
        args, kwargs = _filled(self.args, y), _filled(self.kwargs, y)
        if self.target.kind == "module":
            return layer(y)
        if self.target.kind == "method":
            return getattr(args[0], self.target.name)(*args[1:], **kwargs)
        return self.target.key(*args, **kwargs)


def _filled(value, y):
    if isinstance(value, Moving):
        return value.function(y)
    if isinstance(value, dict):
        return {key: _filled(v, y) for key, v in value.items()}
    return type(value)(_filled(v, y) for v in value) if isinstance(value, (list, tuple)) else value


def values(target, name):
    return VALUES.get((target.base, name), VALUES.get(name, []))


def _settings(target, names, thorough):
    """The arguments of each case: one changed from the base at a time, or two."""
    bases = MADE.get(target.key, [(PLAIN, {})]) if target.kind == "module" else BASES.get(target.base, [(PLAIN, {})])
    for shape, base in bases:
        if target.writes and "input" in base:
            continue  # it would write to a constant: a network with state
        yield shape, base
        choices = [[(name, value) for value in values(target, name)] for name in names]
        for chosen in itertools.chain(*choices):
            yield shape, {**base, chosen[0]: chosen[1]}
        for first, second in itertools.combinations(choices, 2) if thorough else ():
            for one, two in itertools.product(first, second):
                yield shape, {**base, one[0]: one[1], two[0]: two[1]}


def cases(target, thorough=False):
    """All cases of a target: one argument changed at a time in one form of the call; thoroughly two, in all forms."""
    orders = schema(target)
    names = dict.fromkeys(name for order in orders for name in order if name != "*")
    for number, (shape, settings) in enumerate(_settings(target, names, thorough)):
        if target.kind == "module":
            layer = _made(target.key, settings)
            forms = [] if layer is None else [Case(target, shape, [INPUT], {}, settings, layer=layer)]
        else:
            forms = list(_forms(target, orders, shape, settings))
            if number and not thorough:
                forms = [forms[number % len(forms)]]
        yield from forms
        # What a call writes to, or shares its memory with, shows when its input is read after it, or its result is written to.
        if (number == 0 or "inplace" in settings or "out" in settings) and target not in BY_CHECK:
            yield from (replace(form, harness=harness) for form in forms[:1] + forms[1:][-1:] for harness in ("kept", "written"))


def _made(kind, settings):
    torch.manual_seed(zlib.crc32(repr((kind.__name__, settings)).encode()))
    try:
        layer = kind(**settings).double().eval()
    except Exception:
        return None
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=1.5)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.01, 2)
    return layer


def _forms(target, orders, shape, settings):
    """The same call with keywords, and by position as far as the arguments of an overload follow each other."""
    first = orders[0][0]
    full = {first: INPUT, **settings}
    if target.kind == "function" and not target.by_operator:
        yield Case(target, shape, [], full, settings)
    for order in orders:
        args = list(itertools.takewhile(lambda name: name in full, order))
        rest = {name: value for name, value in full.items() if name not in args}
        if (rest and target.by_operator) or not args:
            continue
        yield Case(target, shape, [full[name] for name in args], rest, settings)
        sequence = full[args[-1]]
        if target.kind == "method" and len(args) == 2 and isinstance(sequence, tuple):
            yield Case(target, shape, [full[first], *sequence], rest, settings)  # x.view(2, 4)


class Probe(nn.Module):
    """A network that is one call: its results as one row, beside its input where that is read after it."""

    def __init__(self, case):
        super().__init__()
        self.case, self.layer = case, case.layer
        self.dtype = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        with torch.no_grad():
            result = self._result(torch.rand(1, 1, 1, self.size, dtype=torch.float64))[1]
        self.parts = None if isinstance(result, torch.Tensor) else len(result)
        self.joint = None if self.parts is None else _joint(result)

    @property
    def size(self):
        return torch.Size(self.case.shape).numel()

    def _result(self, x):
        y = x.reshape(self.case.shape) * 1.0
        return y, self.case.call(y, self.layer)

    def forward(self, x):
        y, z = self._result(x)
        if self.case.harness == "plain" and self.joint is not None:
            return torch.cat(z, self.joint).reshape(1, -1)  # all parts at once, as the call returns them
        parts = [z] if self.parts is None else [z[i] for i in range(self.parts)]
        if self.case.harness == "written":
            parts = [part.mul_(3.0) for part in parts]
        if self.case.harness != "plain":
            parts.append(y)
        return torch.cat([part.reshape(1, -1) for part in parts], 1)


def _joint(parts):
    """A dimension that the parts can be joined along, or None."""
    for dim in range(parts[0].dim()):
        if len({tuple(n for i, n in enumerate(part.shape) if i != dim) for part in parts}) == 1:
            return dim
    return None
