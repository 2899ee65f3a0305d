"""The graph of a Classifier, by torch.fx, with what each node returned for one input."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from rsplugins.classifier import Classifier
from rsplugins.double import bring, brought, copied
from rsplugins.errors import UsageError
from rsplugins.lipschitz.products import Factor, is_product
from rsplugins.lipschitz.products import Recorder as ProductRecorder
from rsplugins.lipschitz.shapes import Examples, Sized
from rsplugins.watch import lines
from rsplugins.watch.taint import tensors
from rsplugins.watch.writes import version

PREPROCESS = "preprocess"
"""Path of the node that resizes and normalises; a network's own layer of this name would have to be called otherwise."""

_SHAPE_FUNCTIONS = {"size", "dim", "numel", "ndimension", "element_size"}
_MAKERS = {"new_full", "new_zeros", "new_ones"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}


class UnsupportedLayerError(UsageError):
    """A layer without a sound Lipschitz bound; the fix names a cut before it where one helps."""


class Preprocess(nn.Module):
    """The Classifier's resizing and normalisation as a layer."""

    keeps_nothing = True

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.origin = (classifier,)  # in a tuple: the network's weights must not appear twice

    def forward(self, x: Tensor) -> Tensor:
        """Return what the Classifier gives its module."""
        return self.origin[0].preprocess(x)


class Pipeline(nn.Module):
    """A Classifier with its preprocessing as a layer of its own; the network's layers keep their paths below ``module``."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.preprocess = Preprocess(classifier)
        self.module = classifier.module

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.module(self.preprocess(x))
        return logits


@dataclass(frozen=True)
class Info:
    """What a node returned for one image.

    Attributes:
        shape: of a tensor, batch size 1; None for anything else.
        static: the value, where it does not depend on the image's pixels (weights, numbers, shapes).
        varying: whether it depends on the pixels.
        operations: floating-point operations of this node.
        memory: names of the memory that its tensors lie in.
        written: names of the memory that it wrote in place, of what it was given.
    """

    shape: tuple[int, ...] | None
    static: Any
    varying: bool
    operations: int
    memory: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()


@dataclass
class Traced:
    """A graph and what is known of its nodes.

    Attributes:
        root: the module that the graph's targets are found in.
        graph: the graph.
        info: by node.
        outputs: by layer path (without the leading ``module.``): the nodes that its calls returned.
        opaque: by layer path: why it could not be traced; it is one node of the graph.
        products: by node that multiplies two values of the image: what is known of the factors.
    """

    root: Pipeline
    graph: fx.Graph
    info: dict[fx.Node, Info] = field(default_factory=dict)
    outputs: dict[str, list[fx.Node]] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    products: dict[fx.Node, tuple[Factor, Factor]] = field(default_factory=dict)

    @property
    def reach(self) -> float:
        """How far from an image the bounds of products hold: the diagonal of the cube of images, in raw pixels."""
        return math.sqrt(math.prod(self.info[self.input].shape or ()))

    @property
    def input(self) -> fx.Node:
        """The node of the image."""
        found: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return found

    @property
    def output(self) -> fx.Node:
        """The node whose value is the logits."""
        final = next(node for node in self.graph.nodes if node.op == "output").args[0]
        if not isinstance(final, fx.Node):
            raise UsageError(
                f"The network returns {type(final).__name__} instead of one tensor of logits.",
                fix="Wrap it in a module whose forward returns the logits alone.",
            )
        return final

    def needed(self) -> set[fx.Node]:
        """Return the nodes that the logits are computed from."""
        return ancestors(self.output)

    def path(self, node: fx.Node) -> str:
        """Return a name of a node that a reader finds in the model: a layer path where there is one."""
        if node.op == "call_module":
            return public_path(str(node.target))
        stack = [str(path) for path in node.meta.get("nn_module_stack", {})]
        inner = public_path(stack[-1]) if stack else ""
        return inner if inner not in ("", "module") else node.name


def public_path(path: str) -> str:
    """Return a layer path as the user knows it, relative to the Classifier's module."""
    return path.removeprefix("module.")


def ancestors(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """Return a node and all it is computed from, not looking behind ``stop``."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            if current is not stop:
                stack.extend(current.all_input_nodes)
    return seen


def descendants(node: fx.Node) -> set[fx.Node]:
    """Return all that is computed from a node, without the node."""
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.users)
    return seen


class _InPlace(Sized):
    """A value of which ``h += g`` is recorded as a write: torch.fx has ``h = h + g``, and other names of h would miss it."""


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_InPlace, f"__{_name}__", _augmented(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Traces through everything but leaves; a layer that cannot be traced becomes one opaque node.

    Args:
        is_leaf: from a module and its path to whether it is one node; None leaves it to torch.fx.
        size: of one image; sizes are then numbers in the graph, all but the batch's.
    """

    record_stack_traces = True

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool | None], size: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self._size = size
        self._examples = Examples(self._found)
        self.outputs: dict[str, list[fx.Node]] = defaultdict(list)
        self.opaque: dict[str, str] = {}
        self._is_leaf = is_leaf

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the stand-in for a node's value."""
        return _InPlace(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        """Return the stand-in for a call's result, with an example of it."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if self._size is not None and isinstance(proxy, Sized):
            known = kind == "placeholder"
            proxy.example = self._examples.image(self._size) if known else self._examples.of(kind, target, args, kwargs)
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute of a module: a stand-in for a parameter, but not while an example is run."""
        return attr_val if self._examples.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _found(self, target: str) -> Any:
        found: Any = self.root
        for name in target.split("."):
            found = getattr(found, name)
        return found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node."""
        known = self._is_leaf(m, module_qualified_name)
        return super().is_leaf_module(m, module_qualified_name) if known is None else known

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace a call, and note the node it returned under the module's path."""
        if self._examples.running:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        scope, stack, before = self.scope, self.module_stack.copy(), set(self.graph.nodes)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if not _plain((args, kwargs)):
                raise
            self.scope, self.module_stack = scope, stack  # the failed attempt may have left its own behind
            for node in reversed([node for node in self.graph.nodes if node not in before]):
                self.graph.erase_node(node)
            reason = str(error).split("\n")[0]
            # The whole network may be such a layer: it can still be cut behind its preprocessing.
            self.opaque[public_path(path)] = f"it cannot be traced by torch.fx: {reason}" if path == "module" else reason
            result = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs[public_path(path)].append(result.node)
        return result


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_plain(v) for v in value.values())
    return value is None or isinstance(value, (fx.Proxy, int, float, bool, str, Tensor))


class _Recorder(fx.Interpreter):
    """Runs the graph once and notes shapes, constants, operations and which memory is read and written."""

    def __init__(self, traced: Traced, counter: FlopCounterMode) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.traced = traced
        self.counter = counter
        self._kept: dict[int, StorageWeakRef] = {}  # so that no name of memory is given twice

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        given = [tensor for node in n.all_input_nodes for tensor in tensors(self.env[node])]
        versions = [version(tensor) for tensor in given]
        result = super().run_node(n)
        if n.op != "output":
            written = [tensor for tensor, count in zip(given, versions, strict=True) if version(tensor) != count]
            varying = n.op == "placeholder" or any(self.traced.info[i].varying for i in _read(n))
            varying = varying and not reads_shape(n)
            shape = tuple(result.shape) if isinstance(result, Tensor) else None
            operations = self.counter.get_total_flops() - before
            static = None if varying else result
            self.traced.info[n] = Info(shape, static, varying, operations, self._memory(tensors(result)), self._memory(written))
        return result

    def _memory(self, found: Iterable[Tensor]) -> frozenset[int]:
        storages = [tensor.untyped_storage() for tensor in found if tensor.layout is torch.strided]
        for storage in storages:
            if storage._cdata not in self._kept:
                self._kept[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return frozenset(storage._cdata for storage in storages)


def reads_shape(node: fx.Node) -> bool:
    """Return whether a node gives something of a tensor that does not depend on its values."""
    if node.op == "call_method":
        return node.target in _SHAPE_FUNCTIONS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node reads: a new tensor has only the format of the one that it is made by."""
    if node.op == "call_method" and node.target in _MAKERS:
        rest = (node.args[1:], {name: value for name, value in node.kwargs.items() if name != "self"})
        found: list[fx.Node] = []
        fx.node.map_arg(rest, found.append)
        return found
    return node.all_input_nodes


def known_size(classifier: Classifier, input_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Check that a Classifier can be traced as far as its mode and dtype go, and return the shape of one raw image.

    Raises:
        UsageError: it is in training mode, its weights are coarser than float32, or the size is not known.
    """
    classifier.check_ready()
    if classifier.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"The network's weights are {str(classifier.dtype).removeprefix('torch.')}; the bounds do not hold for it.",
            cause="they bound the network in exact arithmetic, of which this format is too coarse a copy.",
            fix="Convert it with classifier.float().",
        )
    size = input_size or classifier.input_size
    if size is None:
        raise UsageError(
            "The size of the images is not known, and the bound of a convolution depends on it.",
            fix="Pass input_size=(C, H, W) to wrap().",
        )
    return size


def trace(classifier: Classifier, is_known: Callable[[nn.Module], bool], input_size: tuple[int, ...] | None = None) -> Traced:
    """Trace a Classifier and run it once on a grey image.

    Args:
        classifier: in eval mode.
        is_known: whether a layer stands in the graph as one node, whatever its forward does.
        input_size: shape of one raw image; taken from the Classifier when left out.

    Raises:
        UsageError: the network's own forward branches on its input, returns something else than a tensor, is in training mode, or
            the size is not known.
    """
    size = known_size(classifier, input_size)
    root = Pipeline(classifier).eval()
    tracer = Tracer(lambda m, path: True if isinstance(m, Preprocess) or is_known(m) else None, size)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{type(classifier.module).__name__} cannot be traced by torch.fx: {reason}.",
            cause="its forward has control flow that depends on the input, or unpacks a tensor.",
            fix="Rewrite that part, or move it into a layer of its own: such a layer stands in the graph as one node.",
        ) from error
    traced = Traced(root, graph, outputs=dict(tracer.outputs), opaque=tracer.opaque)
    counter = FlopCounterMode(display=False)
    image = torch.full((1, *size), 0.5, device=classifier.device)
    with torch.no_grad(), counter:
        _Recorder(traced, counter).run(image)
    _drop_unused(traced)
    _look_at_products(traced, classifier, image)
    return traced


def _look_at_products(traced: Traced, classifier: Classifier, image: Tensor) -> None:
    def varying(node: fx.Node) -> bool:
        return sum(isinstance(argument, fx.Node) and traced.info[argument].varying for argument in node.args) == 2

    wanted = {node for node in traced.graph.nodes if is_product(node) and len(node.args) == 2 and varying(node)}
    if not wanted:
        return
    double = Pipeline(brought(copied(classifier), torch.float64)).eval()
    recorder = ProductRecorder(double, traced.graph, wanted)
    try:
        with torch.no_grad():
            recorder.run(bring(image, double.preprocess.origin[0].device, torch.float64))
    except (RuntimeError, TypeError):  # a format that the code names; the products have no bound then
        return
    traced.products = recorder.found


def _drop_unused(traced: Traced) -> None:
    # Assertions are of no use here. A write in place is of use although nothing takes what it returns.
    needed = traced.needed() | {traced.input}
    lasting = frozenset().union(*(info.memory for node, info in traced.info.items() if node.op == "get_attr"))
    for node in reversed(list(traced.graph.nodes)):
        if node.op == "output":
            continue
        written = traced.info[node].written
        if written & lasting or (written and node not in needed):
            raise _lost(traced, node)
        if node in needed:
            continue
        traced.graph.erase_node(node)
        del traced.info[node]
    traced.outputs = {
        path: kept for path, nodes in traced.outputs.items() if (kept := [node for node in nodes if node in needed])
    }


def _lost(traced: Traced, node: fx.Node) -> UsageError:
    line = lines.of_stack(node.stack_trace or "")
    if node.kwargs.get("out") is not None:
        name = getattr(node.target, "__name__", node.target)
        return UnsupportedLayerError(
            f"Layer {traced.path(node)!r} ({name}) has no sound Lipschitz bound: {name} is called with out=a tensor"
            f"{lines.place(line)}. Nothing was certified.",
            cause="a trace keeps one tensor for the writes of all calls, or none of what reads it afterwards.",
            fix=f"Use what {name} returns, without out=.",
        )
    return UsageError(
        f"What torch.fx traces without a write in place differs from the whole network: {line or traced.path(node)}. "
        "Nothing was certified.",
        cause="forward changes a tensor in place that outlives the call, or does not use what the call returns, so that it is in "
        "no path to the logits.",
        fix="Write it out of place: h = h - g for h.sub_(g).",
    )


def total_operations(traced: Traced, nodes: set[fx.Node]) -> int:
    """Return the operations of some nodes; at least 1, so that shares can be taken."""
    return max(1, sum(traced.info[node].operations for node in nodes if node in traced.info))
