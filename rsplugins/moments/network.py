"""The walk: a Gaussian through auto-LiRPA's graph of a model, node by node."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.classifier import Classifier
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.double import bring, brought, copied
from rsplugins.errors import OutputValueError, ParameterError
from rsplugins.lirpa.bridge import quiet
from rsplugins.lirpa.diagnosis import NotBoundedError
from rsplugins.lirpa.graph import bounded, check_deployed
from rsplugins.moments.activations import Gelu
from rsplugins.moments.operations import Elementwise, Representation
from rsplugins.moments.rules import RULES, Rule, Site


class LogitGaussian(NamedTuple):
    """The Gaussian that the logits are taken for.

    Attributes:
        mean: (B, K).
        covariance: (B, K, K), symmetric positive semi-definite.
    """

    mean: Tensor
    covariance: Tensor


class Propagation(ABC):
    """What becomes of N(x, sigma^2 I) in a model, however its layers are found."""

    def propagate(self, images: Tensor, sigma: float, representation: Representation) -> LogitGaussian:
        """Propagate N(x, sigma^2 I) for every image x.

        Args:
            images: (B, ...), raw pixels.
            sigma: standard deviation, > 0.
            representation: a new one, such as ``Full()``, ``Channel()`` or ``LowRank()``.

        Raises:
            ParameterError: sigma is not above 0.
            OutputValueError: moments that are not finite.
        """
        found = LogitGaussian(*representation.output(self.walk(images, sigma, representation)))
        if not bool(found.mean.isfinite().all() and found.covariance.isfinite().all()):
            raise OutputValueError(
                "The propagated moments are not finite.",
                cause="weights or activations so large that their squares overflow.",
                fix="Propagate in float64 (dtype=torch.float64).",
            )
        return found

    @abstractmethod
    def walk(self, images: Tensor, sigma: float, representation: Representation) -> str:
        """As :meth:`propagate`, without the last step: return the name under which the representation knows the logits.

        Nothing here waits for the device, for those who propagate at every step of a training.
        """


class _Step(NamedTuple):
    node: Any
    sources: tuple[str, ...]
    keep: tuple[str, ...]
    fused: bool


class MomentNetwork(Propagation):
    """A model, traced once, that answers "what becomes of N(x, sigma^2 I)?".

    A Classifier is traced whole, its normalisation included, so sigma is in raw pixels. The trace shares the model's parameters:
    propagation is differentiable with respect to them and to the images.

    Args:
        model: a Classifier or any module from (B, ...) to (B, K), in eval mode where that matters.
        example: one or more inputs, for their shape.
        rules: more rules, by the class name of auto-LiRPA's operator; they come before the built-in ones.
        dtype: when given, a copy of the model in this dtype is propagated through.
        explain: whether a refusal names the layer, which is searched for by tracing each alone.

    Raises:
        UsageError: dropout or batch normalisation in training mode.
        ParameterError: a layer without a moment rule, named; or one that auto-LiRPA does not trace.
        CheckpointError: weights that are not finite.

    Example:
        >>> from rsplugins.moments import Full
        >>> model = nn.Linear(3, 2)
        >>> network = MomentNetwork(model, torch.rand(1, 3))
        >>> found = network.propagate(torch.rand(5, 3), 0.25, Full())
        >>> found.mean.shape, found.covariance.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        rules: Mapping[str, Rule] | None = None,
        dtype: torch.dtype | None = None,
        explain: bool = True,
    ) -> None:
        if dtype is not None:
            check_deployed(model, example)
            model = brought(copied(model), dtype)
        model = without_casts(model)
        tensors = (*model.parameters(), *model.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), example)
        self.dtype, self.device = dtype or like.dtype, like.device
        example = bring(example[:1], self.device, self.dtype)
        # Rules of plugins come first, and are looked up one by one: each look imports one.
        self._rules = ChainMap(dict[str, Rule](), rules or {}, RULES)  # type: ignore[arg-type]  # none is written to
        self._explain = explain
        self._graph = bounded(model, example, _Traced(rules or {}), explain=explain)
        self._run(example)
        self._root = next(node.name for node in self._nodes() if type(node).__name__ == "BoundInput")
        self._random: dict[str, bool] = {}
        self._steps = self._plan(self._graph[self._graph.final_name], model, example)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """For every step, how many numbers its first source and its output hold for one input."""
        steps = self._steps
        return [(self._size(self._graph[step.sources[0]]), self._size(step.node)) for step in steps]

    @property
    def inputs(self) -> int:
        """How many numbers one input holds."""
        return self._size(self._graph[self._root])

    def check_rules(self) -> None:
        """Ask every rule for its operation.

        Raises:
            ParameterError: one that does not account for how its operator is used, such as a product of two random values.
        """
        for step in self._steps:
            if not step.fused:
                self._rules[type(step.node).__name__](self._site(step))

    def walk(self, images: Tensor, sigma: float, representation: Representation) -> str:
        """See :meth:`Propagation.walk`."""
        check_sigma(sigma)
        images = bring(images, self.device, self.dtype)
        self._run(images)
        representation.start(self._root, images, sigma)
        name: str = self._root
        for step in self._steps:
            name = step.node.name
            operation = Elementwise(Gelu()) if step.fused else self._rules[type(step.node).__name__](self._site(step))
            representation.step(name, operation, step.sources, step.keep)
        return name

    def _nodes(self) -> list[Any]:
        return list(self._graph.nodes() if callable(getattr(self._graph, "nodes", None)) else self._graph._modules.values())

    def _run(self, images: Tensor) -> None:
        # Fills every node's forward_value: shapes at this batch size and the values of constants. Parameters come back as
        # themselves, so gradients reach them.
        with torch.no_grad(), quiet():
            self._graph(images)

    def _size(self, node: Any) -> int:
        return math.prod(node.forward_value.shape[1:])

    def _plan(self, final: Any, model: nn.Module, example: Tensor) -> list[_Step]:
        """Order the random nodes that lead to the output, each with what must outlive it."""
        order: list[tuple[Any, tuple[str, ...], bool]] = []
        done = {self._root}

        def visit(node: Any) -> None:
            if node.name in done:
                return
            source = _gelu_source(node)
            parents = [source] if source is not None else [parent for parent in node.inputs if self._is_random(parent)]
            for parent in parents:
                visit(parent)
            if source is None and type(node).__name__ not in self._rules:
                raise (
                    _no_rule(node, model, example)
                    if self._explain
                    else NotBoundedError(f"There is no moment rule for {type(node).__name__}.")
                )
            done.add(node.name)
            order.append((node, tuple(parent.name for parent in parents), source is not None))

        if not self._is_random(final):
            raise ParameterError("The model's output does not depend on its input.", fix="Check its forward().")
        visit(final)
        last = {name: position for position, (_, sources, _) in enumerate(order) for name in sources}
        steps, alive = [], [self._root]
        for position, (node, sources, fused) in enumerate(order):
            alive = [name for name in alive if last.get(name, -1) > position]
            steps.append(_Step(node, sources, tuple(alive), fused))
            alive.append(node.name)
        return steps

    def _is_random(self, node: Any) -> bool:
        if node.name not in self._random:
            own = type(node).__name__ != "BoundShape" and any(self._is_random(parent) for parent in node.inputs)
            self._random[node.name] = node.name == self._root or own
        return self._random[node.name]

    def _site(self, step: _Step) -> Site:
        node = step.node
        values = tuple(None if self._is_random(parent) else parent.forward_value for parent in node.inputs)
        before = tuple(self._graph[step.sources[0]].forward_value.shape[1:])
        return Site(node, values, before, tuple(node.forward_value.shape[1:]))


class _Normalised(nn.Module):
    """A Classifier without its cast to the network's dtype, which release 0.3 turns into one to float32."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.module = classifier.module
        self.normalised = classifier.normalised

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(self.normalised(x))
        return logits


def without_casts(model: nn.Module) -> nn.Module:
    """Return a Classifier as its network and normalisation alone; other modules, and one that resizes, as they are."""
    if not isinstance(model, Classifier) or model.resize is not None:
        return model
    return _Normalised(model).train(model.training)


def check_sigma(sigma: float) -> None:
    """Check a standard deviation.

    Raises:
        ParameterError: not a finite number above 0.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ParameterError(
            f"sigma is {sigma!r}; allowed: a finite number above 0.",
            cause="without noise there is nothing to propagate.",
            fix="Use the standard deviation that the model was trained with, such as 0.25.",
        )


class _Traced(Mapping[str, type]):
    """Operators that let be traced what auto-LiRPA does not have: the error function, and what plugins bring with their rules."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = rules
        self._operators = import_module("auto_LiRPA.bound_ops") if bridge_auto_lirpa() else None

    def __iter__(self) -> Iterator[str]:
        names = (operator for operator in self._rules if not hasattr(self._operators, operator))
        return iter(["onnx::Erf", *(f"onnx::{operator.removeprefix('Bound')}" for operator in names)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, operator: object) -> bool:
        return any(operator == each for each in self)

    def __getitem__(self, operator: str) -> type:
        if operator == "onnx::Erf":
            return _erf()
        name = f"Bound{operator.removeprefix('onnx::')}"
        forward = getattr(self._rules[name], "forward", None)
        if forward is None:
            raise ParameterError(
                f"The moment rule for {name} cannot be reached: this release of auto-LiRPA has no such operator.",
                cause="a network is traced with auto-LiRPA's operators, and the rule does not bring the function of this one.",
                fix="Give the rule an attribute `forward`, (node, *inputs) -> Tensor: rule.forward = lambda node, x: F.elu(x).",
            )
        return type(name, (_bound(),), {"forward": forward})


def _bound() -> Any:
    bridge_auto_lirpa()
    return import_module("auto_LiRPA.bound_ops").Bound


def _erf() -> type:
    """Return an operator that lets the error function be traced; release 0.3 has none, and GELU is made of it."""
    return type("BoundErf", (_bound(),), {"forward": lambda self, x: torch.erf(x)})


def _gelu_source(node: Any) -> Any:
    """Return the node that a GELU was applied to when this is the last of the operators that make one up, otherwise None.

    Exporters write x * (erf(x / sqrt 2) + 1) * 0.5 in several ways, so the candidates are compared by their values.
    """
    if type(node).__name__ != "BoundMul":
        return None
    near, frontier = [], [node]
    for _ in range(6):
        frontier = [parent for child in frontier for parent in child.inputs if hasattr(parent, "name")]
        near.extend(frontier)
    if not any(type(parent).__name__ == "BoundErf" for parent in near):
        return None
    value = node.forward_value
    for candidate in near:
        guess = candidate.forward_value
        same = isinstance(guess, Tensor) and guess.shape == value.shape and guess.is_floating_point()
        if same and torch.allclose(F.gelu(guess), value, rtol=1e-4, atol=1e-6):
            return candidate
    return None


def _no_rule(node: Any, model: nn.Module, example: Tensor) -> ParameterError:
    kind = type(node).__name__
    layer = _layer_with(kind, model, example)
    where = f"layer {layer}" if layer else f"the operator {node.name} in forward() of {type(model).__name__}"
    fix = "Leave the softmax out: propagation takes logits." if "oftmax" in kind + layer or kind == "BoundExp" else ""
    return ParameterError(
        f"There is no moment rule for {where} ({kind}).",
        cause="moments are known for linear layers, convolutions, batch normalisation, ReLU, leaky ReLU, GELU, tanh, sigmoid, "
        "average and max pooling, reshaping, additions and concatenations.",
        fix=fix or "Use one of those, or register a rule for it through the hook rsplugins_moment_rules.",
    )


def _layer_with(kind: str, model: nn.Module, example: Tensor) -> str:
    """Return the first leaf layer whose own trace has a node of this class, with its type; empty when there is none."""
    given: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: given.update({name: given.get(name, inputs[0])})

    leaves = [(name, layer) for name, layer in model.named_modules() if not any(True for _ in layer.children())]
    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in leaves]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in leaves:
        if name not in given:
            continue
        try:
            graph = bounded(layer, given[name], {"onnx::Erf": _erf()})
        except Exception:  # this layer cannot be traced by itself, so it cannot be the one that was
            continue
        nodes = graph.nodes() if callable(getattr(graph, "nodes", None)) else graph._modules.values()
        if any(type(node).__name__ == kind for node in nodes):
            return f"{name!r} ({type(layer).__name__})"
    return ""
