"""The Lipschitz constant of a Classifier and of each of its layers, composed over the traced graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from rsplugins.arithmetic import full_precision
from rsplugins.classifier import Classifier
from rsplugins.double import copied
from rsplugins.errors import UnknownNameError, UsageError
from rsplugins.lipschitz.aliasing import overwritten_too_early
from rsplugins.lipschitz.composition import Evaluation, Value
from rsplugins.lipschitz.consistency import check_function, check_images_apart, check_untouched
from rsplugins.lipschitz.dispatch import value_of
from rsplugins.lipschitz.layers import is_known_module, is_restless
from rsplugins.lipschitz.norms import TOLERANCE
from rsplugins.lipschitz.rules import NoBoundError, UnsupportedLayerError
from rsplugins.lipschitz.tracing import Traced, ancestors, descendants, known_size, total_operations, trace
from rsplugins.watch import check_function as watch
from rsplugins.watch import kept_generators


@dataclass(frozen=True)
class Row:
    """One line of the table of layers.

    Attributes:
        name: path of the layer, or name of the operation.
        kind: class or function.
        factor: what the layer contributes by itself; None where it is folded into the next line or has no bound.
        constant: bound of the network up to and including the layer; None likewise.
        note: ``"folded"``, or why there is no bound.
    """

    name: str
    kind: str
    factor: float | None
    constant: float | None
    note: str = ""


@dataclass(frozen=True)
class Cut:
    """A layer at which the network can be cut.

    Attributes:
        layer: its path, as ``split`` takes it.
        constant: Lipschitz bound of the encoder that ends there; None when it has none.
        share: the encoder's share of all operations, in [0, 1].
    """

    layer: str
    constant: float | None
    share: float


@dataclass
class Analysis:
    """What is known of a traced Classifier.

    Attributes:
        classifier: the copy that was traced.
        traced: the graph.
        sha256: ``Classifier.fingerprint()`` of the Classifier that was analysed: whose bounds these are.
        values: by node, for nodes with a bound.
        refusals: by node: why it has none. Nodes behind one of these are in neither.
        evaluation: the constants computed so far.
    """

    classifier: Classifier
    traced: Traced
    sha256: str
    values: dict[fx.Node, Value] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def reach(self) -> float:
        """How far from an image in [0, 1] the bounds hold, in raw pixels: everywhere, but where two values are multiplied."""
        return self.traced.reach if any(value.product is not None for value in self.values.values()) else math.inf

    def check_unchanged(self, classifier: Classifier) -> None:
        """Check that a Classifier still has the weights that these bounds are of.

        Raises:
            UsageError: it has others.
        """
        if classifier.fingerprint() != self.sha256:
            raise UsageError(
                "The weights have changed since their Lipschitz bounds were computed; the bounds do not hold for the new ones.",
                cause="the model was trained, loaded or moved to another dtype after the certifier was made.",
                fix="Make the certifier again, or call rsplugins.certify, which does.",
            )

    @full_precision()
    def constant(self, node: fx.Node | None = None) -> float:
        """Return an upper bound of the Lipschitz constant from the raw image to a node (the logits by default).

        Raises:
            UnsupportedLayerError: a layer on the way has no bound; names it and the nearest cut before it.
        """
        node = node or self.traced.output
        if not self.traced.info[node].varying:
            return 0.0
        if node not in self.values:
            raise self._unsupported(node)
        for earlier in self.traced.graph.nodes:  # in order, so that no recursion runs deep
            if earlier is node:
                break
            if earlier in self.values and self.values[earlier].operator is None:
                self.evaluation.constant(self.values[earlier])
        return self.evaluation.constant(self.values[node])

    def cut_nodes(self) -> dict[str, fx.Node]:
        """Return the layers whose output is one tensor that all of the rest is computed from, in order."""
        order = {node: i for i, node in enumerate(self.traced.graph.nodes)}
        found = {
            path: nodes[0]
            for path, nodes in self.traced.outputs.items()
            if len(nodes) == 1 and nodes[0] is not self.traced.output and self.bypass(nodes[0]) is None
        }
        return dict(sorted(found.items(), key=lambda item: (order[item[1]], item[0].count("."))))

    def bypass(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return an edge (from, to) by which the image reaches the logits without passing a node, or None."""
        head = ancestors(self.traced.output, node) - {node}
        behind = descendants(node)
        reached = {n for n in head if self.traced.info[n].varying and n not in behind}
        for later in self.traced.graph.nodes:
            for source in later.all_input_nodes:
                if later in behind and source in reached:
                    return source, later
        return (self.traced.input, self.traced.output) if reached else None

    def cuts(self) -> list[Cut]:
        """Return all cuts, in the order of the network, with bounds computed; several names of one place are given once."""
        whole = total_operations(self.traced, set(self.traced.info))
        cuts, seen = [], set()
        for layer, node in self.cut_nodes().items():
            if node in seen or self._folds_further(node):
                continue
            seen.add(node)
            constant = self.constant(node) if node in self.values else None
            cuts.append(Cut(layer, constant, total_operations(self.traced, ancestors(node)) / whole))
        return cuts

    def _folds_further(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        users = [self.values.get(user) for user in node.users]
        return value is not None and value.operator is not None and any(_folded(value, user) for user in users)

    def rows(self) -> list[Row]:
        """Return the table of layers, in order."""
        rows = []
        for node in self.traced.graph.nodes:
            if node.op in ("placeholder", "output") or not self.traced.info[node].varying:
                continue
            rows.append(self._row(node))
        return rows

    def until(self, layer: str | None) -> Analysis:
        """Return the analysis without a bound for anything behind a layer, so that no norm is computed there.

        Raises:
            UnknownNameError: there is no such layer among the traced ones.
        """
        if layer is None:
            return self
        if layer not in self.traced.outputs:
            raise UnknownNameError(
                "layer", layer, self.traced.outputs, fix="Use one of the names that `rsplugins lipschitz` prints."
            )
        kept = ancestors(self.traced.outputs[layer][-1])
        beyond = {node: "not looked at" for node in self.values if node not in kept}
        values = {node: value for node, value in self.values.items() if node in kept}
        return replace(self, values=values, refusals={**self.refusals, **beyond})

    def _row(self, node: fx.Node) -> Row:
        name, kind = self.traced.path(node), self._kind(node)
        if node in self.refusals:
            return Row(name, kind, None, None, self.refusals[node])
        if node not in self.values:
            return Row(name, kind, None, None, "behind a layer without a bound")
        if self._folds_further(node):
            return Row(name, kind, None, None, "folded into the next")
        value, constant = self.values[node], self.constant(node)
        if any(self.values.get(source) is value for source in node.all_input_nodes):
            return Row(name, kind, 1.0, constant)
        return Row(name, kind, self.evaluation.factor(value), constant, value.note)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.traced.root.get_submodule(str(node.target))).__name__
        return str(getattr(node.target, "__name__", node.target))

    def _unsupported(self, node: fx.Node) -> UnsupportedLayerError:
        needed = ancestors(node)
        first = next(n for n in self.traced.graph.nodes if n in self.refusals and n in needed)
        usable = [layer for layer, cut in self.cut_nodes().items() if cut in self.values and cut in ancestors(first)]
        return UnsupportedLayerError(
            f"Layer {self.traced.path(first)!r} ({self._kind(first)}) has no sound Lipschitz bound: {self.refusals[first]}.",
            cause="an operation whose slope is not bounded, or that rsplugins.lipschitz has no rule for.",
            fix=f"Cut before it: split={usable[-1]!r} is the nearest cut that works."
            if usable
            else "No layer before it can be cut at; use a certifier that needs no Lipschitz bound, such as 'gaussian'.",
        )


def _folded(value: Value, user: Value | None) -> bool:
    return user is not None and user is not value and user.note == "fused" and user.inputs == value.inputs


@full_precision()
def analyse(classifier: Classifier, input_size: tuple[int, ...] | None = None, *, tolerance: float = TOLERANCE) -> Analysis:
    """Trace a Classifier and set up the bound of every node; norms are computed when they are asked for.

    A copy is traced, so that what a layer counts or caches in the caller's network is left alone.

    A sum of branches adds their constants, a concatenation adds squares, layers after each other multiply; normalisation and
    eval-mode batch normalisation are folded into the weights next to them before these are bounded.

    Args:
        classifier: in eval mode.
        input_size: shape of one raw image; taken from the Classifier when left out.
        tolerance: relative width of the bounds of single layers.

    Raises:
        UsageError: the network cannot be copied, or not be traced (see :func:`rsplugins.lipschitz.tracing.trace`), is random or
            has state, mixes the images of a batch, or the Classifier is changed by a subclass or a hook.
    """
    sha256 = classifier.fingerprint()
    check_untouched(classifier)
    classifier = private_copy(classifier)
    with kept_generators(classifier.device):
        size = known_size(classifier, input_size)
        watch(classifier, torch.zeros(1, *size, device=classifier.device), exact=not is_restless(classifier))
        traced = trace(classifier, is_known_module, size)
        check_function(traced, classifier, restless=is_restless(classifier))
    analysis = Analysis(classifier, traced, sha256, evaluation=Evaluation(tolerance))
    overwritten = overwritten_too_early(traced)
    for node in traced.graph.nodes:
        if node.op == "output" or not traced.info[node].varying:
            continue
        varying = [source for source in node.all_input_nodes if traced.info[source].varying]
        if any(source not in analysis.values for source in varying):
            continue
        try:
            if node in overwritten:
                raise NoBoundError(f"it overwrites a value that {overwritten[node]} uses later")
            analysis.values[node] = value_of(traced, node, analysis.values)
        except NoBoundError as error:
            analysis.refusals[node] = str(error)
    if not analysis.refusals:  # a refused layer is the better explanation, and then there is no bound
        check_images_apart(traced, classifier)
    return analysis


def private_copy(classifier: Classifier) -> Classifier:
    """Return a deep copy.

    Raises:
        UsageError: a part of it cannot be copied. The analysis would then run the caller's own layers, which may count or cache.
    """
    classifier.check_ready()
    return copied(classifier).requires_grad_(False)


def lipschitz_bound(classifier: Classifier, input_size: tuple[int, ...] | None = None) -> float:
    """Return an upper bound of the l2 Lipschitz constant of a Classifier, from raw pixels to logits.

    Where the network multiplies two values of the image (gates of squeeze-and-excitation), the bound is one between images that
    lie within the diagonal of the cube [0, 1]^d of an image in it: see :mod:`rsplugins.lipschitz.products`.

    Raises:
        UnsupportedLayerError: a layer has no bound; names it and the nearest cut before it.

    Example:
        >>> import torch, rsplugins
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.init.constant_(layer.weight, 0.5)
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), layer)
        >>> round(lipschitz_bound(rsplugins.wrap(module, std=0.5, input_size=(1, 2, 2))), 3)
        2.828
    """
    return analyse(classifier, input_size).constant()
