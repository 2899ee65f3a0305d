"""Bounds of a classifier's outputs over a ball, by the graph of torch.export: for what auto-LiRPA does not trace."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from rsplugins.arithmetic import full_precision
from rsplugins.aten.graph import attribute, check_graph, exported, last_uses, name_of
from rsplugins.aten.rules import MOVING, Call, rule_for
from rsplugins.aten.values import Ball, Value, enclosed, is_plain, lower_bounds, point, rounding_error
from rsplugins.certificate import Norm
from rsplugins.double import bring, brought, copied
from rsplugins.errors import ParameterError

DUAL = {Norm.LINF: 1.0, Norm.L2: 2.0, Norm.L1: math.inf}

METHODS = ("ibp", "sound-etb", "crown-ibp")
"""Loosest first."""

_ELEMENTS = 2**25
"""Of the rows that are carried back at once, at most, at the widest place."""

_BLOCK = 2**26
"""Outputs of a layer times the widest place of its block, at most, for it to be bounded by blocks."""

_FIRST = 8
"""Rows that are carried back before the others, for a verdict."""

_LAYERS = ("linear", "conv1d", "conv2d")


class ExportedBounds:
    """A model that answers "between what and what are its outputs over this ball?", as torch.export sees it.

    ``ibp`` propagates intervals; the affine end of the network is carried back, so that margins are bounded together.
    ``crown-ibp`` carries rows back to the input through those intervals; see :mod:`rsplugins.aten.values`. One image at a time.
    ``sound-etb`` carries the rows of each layer back through one bend, along its chord, and intersects with the interval; layers
    that are too large for it keep their interval. Intervals and rows are rounded outward.

    Args:
        model: a Classifier or any module from (1, ...) raw pixels to (1, K), in eval mode where that matters; already checked to
            be a function of its input (:func:`rsplugins.watch.check_function`).
        example: one or more inputs, for their shape.
        dtype: in which a copy of the model is bounded.

    Raises:
        ParameterError: torch.export does not trace the model or traces something else, or an operator has no rule; it is named.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, dtype: torch.dtype = torch.float64) -> None:
        model = brought(copied(model), dtype).requires_grad_(False)
        tensors = (*model.parameters(), *model.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), example)
        self.model, self.dtype, self.device = model, dtype, like.device
        self.example = bring(example[:1].detach(), self.device, dtype).clone()
        graph = exported(model, self.example)
        if graph is None:
            raise ParameterError(
                f"torch.export does not trace {type(model).__name__}. Nothing was certified.",
                cause="forward() does something that depends on more than shapes.",
                fix="Use a certifier that runs the model itself, such as 'gaussian'.",
            )
        check_graph(graph, model, self.example, "Nothing was certified.")
        self._graph, self._used = graph, last_uses(graph)
        self._constants: dict[bool, dict[fx.Node, Any]] = {False: {}, True: {}}  # with rounding, and as they come
        sizes = [value.numel() for node in graph.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
        self._largest = max([self.example.numel(), *sizes])
        with torch.no_grad():  # every operator is met once, before anything is claimed
            self._run(point(self.example))

    rounds_outward = True

    @property
    def listing(self) -> str:
        """The graph in words, options included."""
        return str(self._graph.graph)

    @full_precision()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, K) in this dtype."""
        images = bring(images, self.device, self.dtype)
        with torch.no_grad():
            return torch.cat([self.model(image) for image in images.unsqueeze(1)])

    @full_precision()
    def bounds(
        self,
        images: Tensor,
        eps: float | Tensor,
        *,
        norm: Norm = Norm.LINF,
        method: str = "ibp",
        clip: bool = False,
        specification: Tensor | None = None,
        upper: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return lower and upper bounds as :meth:`rsplugins.lirpa.network.BoundNetwork.bounds` does.

        Raises:
            ParameterError: eps below 0, or a method that is not one of :data:`METHODS`.
        """
        if method not in METHODS:
            raise ParameterError(
                f"There is no bound method {method!r} over the graph of torch.export.", fix=f"Use one of: {', '.join(METHODS)}."
            )
        images = bring(images, self.device, self.dtype)
        radius = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64)
        radius = bring(radius, self.device, self.dtype).expand(len(images))
        if not bool((radius >= 0).all()):
            raise ParameterError(f"eps is {float(radius.min()):g}; expected a number of at least 0.")
        lows, highs = [], []
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for row, image in enumerate(images.unsqueeze(1)):
                ball = self._ball(image, float(radius[row]), norm, clip)
                output = self._run(ball.entry, blocks=method == "sound-etb")
                classes = output.low.shape[-1]
                if specification is None:
                    rows = torch.eye(classes, dtype=self.dtype, device=self.device)
                else:
                    rows = bring(specification[row], self.device, self.dtype)
                lows.append(self._lower(output, rows, ball, method, verdict=not upper))
                highs.append(-self._lower(output, -rows, ball, method) if upper else None)
        return torch.stack(lows), torch.stack([high for high in highs if high is not None]) if upper else None

    def _ball(self, image: Tensor, eps: float, norm: Norm, clip: bool) -> Ball:
        low, high = enclosed(image - eps, image + eps, rounding_error(2, image.abs() + eps))
        if not eps:
            low = high = image
        elif clip:
            # An image outside of [0, 1] keeps its own place in the box.
            low, high = torch.maximum(low, image.clamp(max=0)), torch.minimum(high, image.clamp(min=1))
        return Ball(Value(low, high), image, eps, DUAL[norm])

    def _lower(self, output: Value, rows: Tensor, ball: Ball, method: str, *, verdict: bool = False) -> Tensor:
        """Return lower bounds of rows.

        For a verdict, one row that is not above 0 settles the matter. The rows with the least intervals are then carried back
        first, and where one of them stays below 0 the others keep what their interval says.
        """
        if method == "ibp":
            return self._carried(output, rows, ball, bends=0)
        bends, chords = (math.inf, False) if method == "crown-ibp" else (1, True)
        if not verdict or len(rows) <= _FIRST:
            found = self._carried(output, rows, ball, bends=bends, chords=chords)
            return torch.maximum(found, self._carried(output, rows, ball, bends=0))
        found = self._carried(output, rows, ball, bends=0)
        order = found.argsort()
        for part in (order[:_FIRST], order[_FIRST:]):
            found[part] = torch.maximum(found[part], self._carried(output, rows[part], ball, bends=bends, chords=chords))
            if bool((found[part] <= 0).any()):
                break
        return found

    def _carried(self, output: Value, rows: Tensor, ball: Ball, *, bends: float, chords: bool = False) -> Tensor:
        parts = torch.split(rows, max(1, _ELEMENTS // self._largest))
        shaped = [part.view(len(part), *output.low.shape) for part in parts]
        return torch.cat([lower_bounds(output, part, ball, bends=bends, chords=chords) for part in shaped])

    def _run(self, entry: Value, *, blocks: bool = False) -> Value:
        constants = self._constants[is_plain()]
        values: dict[fx.Node, Any] = dict(constants)
        inner: set[fx.Node] = set()  # nodes that depend on the input
        for node in self._graph.graph.nodes:
            if node in values:
                continue
            if node.op == "placeholder":
                values[node] = entry
                inner.add(node)
            elif node.op == "get_attr":
                values[node] = constants[node] = attribute(self._graph, str(node.target))
            elif node.op == "output":
                found = fx.node.map_arg(node.args[0], values.__getitem__)
                found = found[0] if isinstance(found, (tuple, list)) else found
                if not isinstance(found, Value) or not any(source in inner for source in node.all_input_nodes):
                    raise ParameterError("The model's output does not depend on its input.", fix="Check its forward().")
                return found
            else:
                depends = any(source in inner for source in node.all_input_nodes)
                values[node] = self._step(node, values, constant=not depends)
                if depends:
                    inner.add(node)
                    if blocks and name_of(node) in _LAYERS:
                        self._by_blocks(values[node])
                else:
                    constants[node] = values[node]
            for done in self._used.get(node, ()):
                values.pop(done, None)
        raise AssertionError("a graph without an output")

    def _by_blocks(self, value: Value) -> None:
        """Narrow a layer's interval by what its rows say, carried back through one bend."""
        outputs = value.low.numel()
        if outputs * self._largest > _BLOCK:
            return
        low, high = [], []
        size = max(1, _ELEMENTS // self._largest)
        for start in range(0, outputs, size):
            unit = torch.zeros(min(size, outputs - start), outputs, dtype=self.dtype, device=self.device)
            unit.diagonal(start).fill_(1)
            unit = unit.view(-1, *value.low.shape)
            low.append(lower_bounds(value, unit, bends=1, chords=True))
            high.append(-lower_bounds(value, -unit, bends=1, chords=True))
        value.low = torch.maximum(value.low, torch.cat(low).view_as(value.low))
        value.high = torch.minimum(value.high, torch.cat(high).view_as(value.high))

    def _lifted(self, leaf: Any, name: str, node: fx.Node) -> Any:
        """Return a constant as a value; its rounding counts from here."""
        counts = isinstance(leaf, Tensor) and not leaf.is_floating_point() and name in MOVING  # indices
        return point(self._own(leaf, name, node).to(self.dtype)) if isinstance(leaf, Tensor) and not counts else leaf

    def _own(self, leaf: Any, name: str, node: fx.Node) -> Any:
        if not _floats(leaf):
            return leaf
        found = leaf.to(self.dtype)
        if bool((found.to(leaf.dtype) != leaf).any()):
            raise no_rule(node, name)
        return found

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], *, constant: bool) -> Any:
        arguments: Any = fx.node.map_arg(node.args, values.__getitem__)
        options: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if target is operator.getitem:
            if arguments[1] >= len(arguments[0]):  # an index or another part that no rule gives
                raise no_rule(node, name_of(node.args[0]))  # type: ignore[arg-type]
            return arguments[0][arguments[1]]
        leaves, tree = tree_flatten((arguments, options), is_leaf=lambda each: isinstance(each, Value))
        name = name_of(node)
        if constant and not any(isinstance(leaf, Value) for leaf in leaves):
            found = target(*arguments, **options)
            if _is_exact(name, found, [leaf for leaf in leaves if isinstance(leaf, Tensor)]):
                return found
        # What stands beside a value is one itself: carrying is linear, and a constant would be lost in it.
        lifts = constant or name in MOVING
        leaves = [self._lifted(leaf, name, node) if lifts else self._own(leaf, name, node) for leaf in leaves]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Value)]
        sent = tree_unflatten(leaves, tree)

        def run(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, tree)
            return target(*args, **kwargs)

        call = Call(name, _named(target, *sent), run, [leaves[place] for place in places])
        result = _by_rule(node, call)
        if not constant:
            return result
        if isinstance(result, Value):
            return Value(result.low, result.high)
        return [Value(each.low, each.high) for each in result]


def _by_rule(node: fx.Node, call: Call) -> Value | list[Value]:
    try:
        rule = rule_for(call)
        result = None if rule is None else rule(call)
    except (TypeError, ValueError, KeyError) as error:  # options of another form
        raise no_rule(node, call.name) from error
    if result is None:
        raise no_rule(node, call.name)
    return result


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_exact(name: str, found: Any, sources: list[Tensor]) -> bool:
    """Return whether what an operator made of constants is exactly what it stands for."""
    parts = found if isinstance(found, (tuple, list)) else [found]
    if not sources or not any(_floats(part) for part in parts) or name in MOVING or name in ("view", "_unsafe_view", "reshape"):
        return True
    if name in ("_to_copy", "to", "type_as"):
        return bool((found == sources[0]).all())
    # Whole numbers of whole numbers, so small that float32 holds every sum and product on the way, and rounds no quotient to one.
    numbers = [part.double() for part in (*sources, *parts) if isinstance(part, Tensor)]
    whole = all(part.numel() <= 2**13 and bool(((part == part.round()) & (part.abs() < 2**11)).all()) for part in numbers)
    return whole and name in ("floor_divide", "floor", "cumsum", "add", "sub", "div", "mul", "round", "ceil", "sum")


def _named(target: Any, arguments: Any, options: Any) -> dict[str, Any]:
    """Return an operator's arguments by the names of its schema, defaults included."""
    schema = target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    found |= {argument.name: given for argument, given in zip(schema, arguments, strict=False)}
    return found | dict(options)


def no_rule(node: fx.Node, name: str) -> ParameterError:
    """Return the refusal of an operator; it names the line of the model's code where torch.export knows it."""
    stack = (node.meta.get("stack_trace") or "").strip().splitlines()
    place = f" at {' '.join(line.strip() for line in stack[-2:])}" if stack else ""
    return ParameterError(
        f"There are no bounds for the operator {name}{place}. Nothing was certified.",
        cause="neither auto-LiRPA nor the rules over torch.export's graph account for it, or for these options of it.",
        fix="Use a certifier that runs the model itself, such as 'gaussian'.",
    )
