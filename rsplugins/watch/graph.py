"""The check of what TorchScript traces: no write is lost on the way to a graph without writes, and no pixel is a constant."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.double import bring
from rsplugins.errors import UsageError
from rsplugins.watch import lines
from rsplugins.watch.function import kept_generators
from rsplugins.watch.taint import ONLY_SHAPES
from rsplugins.watch.writes import lost

_MAY_ALIAS = {"aten::einsum", "aten::meshgrid", "aten::broadcast_tensors", "aten::dropout", "aten::feature_dropout", "aten::pad"}
"""Operations that may return a view of what they are given, although their schema does not say so."""

_SHAPES = {"aten::size", "aten::dim", "aten::numel", "aten::len", "prim::device", "prim::dtype"}


def check_trace(module: nn.Module, pair: Tensor) -> None:
    """Check that a graph without writes says what TorchScript's trace of a model says, and the same for other pixels.

    The exporter turns ``h.sub_(g)`` into ``h2 = h - g`` and hands on ``h2`` wherever that tensor is read later. What is read
    through another view of the same memory stays as it was before the write, which is lost: such models are refused.

    Args:
        module: what will be traced.
        pair: two inputs, with which it will be.

    Raises:
        UsageError: naming the line of the model's code.
    """
    generator = torch.Generator().manual_seed(1)
    other = bring(torch.rand(pair.shape, generator=generator, dtype=torch.float64), pair.device, pair.dtype)
    with kept_generators(pair.device):
        try:
            graph = _graph(module, pair)
        except Exception:
            return  # what cannot be traced is not certified, and its door says why
        _check_writes(graph)
        try:
            again = _graph(module, other)
        except Exception as error:
            raise _other(lines.of_error(error)) from error
    for a, b in itertools.zip_longest(graph.nodes(), again.nodes()):
        if a is None or b is None or a.kind() != b.kind() or _constant(a) != _constant(b):
            raise _other(lines.of_stack((b if a is None else a).sourceRange()))


def _graph(module: nn.Module, pair: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace that is certified warns by itself
        return torch.jit._get_trace_graph(module, (pair.clone(),))[0]  # type: ignore[attr-defined,no-untyped-call]


def _check_writes(graph: Any) -> None:
    nodes = list(graph.nodes())
    memory = _Aliases()
    varying = _varying(graph, nodes, memory)
    defined = {value.debugName() for value in graph.inputs()}
    stale: dict[str, Any] = {}
    for node in nodes:
        if node.kind() not in _SHAPES:
            _refuse_stale(memory, node.inputs(), stale)
        written = [(part, name) for value, name in _written(node) for part in memory.parts(value) if memory.root(part) in varying]
        if any(name == "out" for _, name in written):
            raise _lost(node)
        fresh = {output.debugName() for output in node.outputs()}
        for part, _ in written:
            stale |= dict.fromkeys((memory.members(memory.root(part)) - fresh) & defined, node)
        defined |= fresh
    _refuse_stale(memory, graph.outputs(), stale)


def _refuse_stale(memory: _Aliases, values: Any, stale: dict[str, Any]) -> None:
    for value in values:
        for part in memory.parts(value):
            if part in stale:
                raise _lost(stale[part])


class _Aliases:
    """Which values may share memory: classes that grow together. A list is no memory of its own, but its parts are."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._lists: dict[str, list[str]] = {}

    def root(self, name: str) -> str:
        while self._parents.setdefault(name, name) != name:
            name = self._parents[name]
        return name

    def members(self, root: str) -> set[str]:
        return {name for name in list(self._parents) if self.root(name) == root}

    def parts(self, value: Any) -> list[str]:
        return self._lists.get(value.debugName(), [value.debugName()])

    def take(self, node: Any) -> None:
        """Note what a node's outputs share with its inputs."""
        inputs, outputs = list(node.inputs()), [value.debugName() for value in node.outputs()]
        if node.kind() in ("prim::ListConstruct", "prim::TupleConstruct"):
            self._lists[outputs[0]] = [part for value in inputs for part in self.parts(value)]
            return
        if node.kind() in ("prim::ListUnpack", "prim::TupleUnpack") and len(self.parts(inputs[0])) == len(outputs):
            pairs = list(zip(self.parts(inputs[0]), outputs, strict=True))
        else:
            pairs = list(itertools.product((part for value in _shared(node) for part in self.parts(value)), outputs))
        for source, target in pairs:
            self._parents[self.root(source)] = self.root(target)


def _varying(graph: Any, nodes: list[Any], memory: _Aliases) -> set[str]:
    """Return the roots of the memory that depends on the input, and fill in which values share memory."""
    image, *_ = [value.debugName() for value in graph.inputs()]
    depends = {image}
    for node in nodes:
        memory.take(node)
        inputs = {part for value in node.inputs() for part in memory.parts(value)}
        if depends & inputs and node.kind() not in _SHAPES and node.kind().removeprefix("aten::") not in ONLY_SHAPES:
            depends.update(part for value in node.outputs() for part in memory.parts(value))
            depends.update(part for value, _ in _written(node) for part in memory.parts(value))
    return {memory.root(name) for name in depends}


def _schema(node: Any) -> Any:
    try:
        return torch._C.parse_schema(node.schema()) if node.schema() != "(no schema)" else None
    except RuntimeError:
        return None


def _shared(node: Any) -> Iterator[Any]:
    """Yield the inputs whose memory an output may share."""
    schema = _schema(node)
    arguments = schema.arguments if schema is not None else []
    containers = node.kind().startswith("prim::") and node.kind() != "prim::Constant"
    for place, value in enumerate(node.inputs()):
        annotated = place < len(arguments) and arguments[place].alias_info is not None
        if annotated or containers or node.kind() in _MAY_ALIAS:
            yield value


def _written(node: Any) -> Iterator[tuple[Any, str]]:
    """Yield the inputs that a node writes, with the argument's name."""
    schema = _schema(node)
    if schema is None:
        if node.kind().startswith("aten::") and node.kind().endswith("_") and not node.kind().endswith("__"):
            yield from ((value, "self") for value in itertools.islice(node.inputs(), 1))
        return
    for value, argument in zip(node.inputs(), schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield value, argument.name


def _lost(node: Any) -> UsageError:
    return lost(lines.of_stack(node.sourceRange()), f"{node.kind()} changes")


def _other(line: str) -> UsageError:
    return UsageError(
        f"The trace of the model is another one for other images{lines.place(line)}. Nothing was certified.",
        cause="values of pixels become a constant of the trace, or forward has state.",
        fix="Write it with tensor operations, or use a certifier that runs the model itself, such as 'gaussian'.",
    )


def _constant(node: Any) -> Any:
    if node.kind() != "prim::Constant" or "value" not in node.attributeNames():
        return None
    if node.kindOf("value") == "t":
        tensor = node.t("value")
        return tensor.dtype, tuple(tensor.shape), tensor.detach().cpu().reshape(-1).tolist() if tensor.numel() < 1e6 else None
    return str(node)[str(node).find("prim::Constant") :].partition("#")[0]
