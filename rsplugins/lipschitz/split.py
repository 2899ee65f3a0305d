"""Cutting a Classifier into encoder and head at a named layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from rsplugins.classifier import Classifier
from rsplugins.errors import RspluginsError, UnknownNameError, UsageError
from rsplugins.lipschitz.analysis import Analysis, analyse
from rsplugins.lipschitz.tracing import PREPROCESS, Pipeline, Traced, Tracer, ancestors, total_operations

_RENORMALISING = ("LayerNorm", "GroupNorm", "InstanceNorm", "layer_norm", "group_norm", "instance_norm", "normalize", "RMSNorm")


class Split(NamedTuple):
    """The two halves of a Classifier; unpacks as ``encoder, head``.

    Attributes:
        encoder: raw [0, 1] pixels to the latent; resizing and normalisation are inside.
        head: the latent to logits.
    """

    encoder: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class CutPoint:
    """A cut with what the latent certifier has to know of it.

    Attributes:
        split: the halves.
        analysis: of the whole Classifier.
        node: the node of the latent.
        share: the encoder's share of all operations.
        renormalises: the head's layers that normalise what they are given. Allowed, because they belong to the smoothed head: the
            radius in the latent holds for any head.
        layer: where it was cut.
    """

    split: Split
    analysis: Analysis
    node: fx.Node
    share: float
    renormalises: tuple[str, ...]
    layer: str


def split_at(classifier: Classifier, layer: str, input_size: tuple[int, ...] | None = None) -> Split:
    """Cut a Classifier behind a named layer and check that head(encoder(x)) equals the whole.

    Args:
        classifier: in eval mode; its weights are shared, not copied.
        layer: path of the layer whose output is the latent, as ``classifier.module.named_modules()`` has it; ``"preprocess"``
            cuts behind the normalisation.
        input_size: shape of one raw image; taken from the Classifier when left out.

    Returns:
        ``(encoder, head)``.

    Raises:
        UnknownNameError: there is no such layer.
        UsageError: the head would need a second tensor from before the cut (a residual branch, a skip connection), the layer is
            used several times or never, or the halves do not reproduce the whole.

    Example:
        >>> import torch, rsplugins
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> encoder, head = split_at(rsplugins.wrap(module, std=0.5, input_size=(1, 2, 2)), "1")
        >>> encoder(torch.zeros(5, 1, 2, 2)).shape, head(torch.zeros(5, 3)).shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """
    return cut(analyse(classifier, input_size), classifier, layer).split


def cut(analysis: Analysis, classifier: Classifier, layer: str) -> CutPoint:
    """Do the same with an analysis at hand; returns more about the cut."""
    node = _node(analysis, classifier, layer)
    bypass = analysis.bypass(node)
    if bypass is not None:
        raise _multi_input(analysis, layer, node, bypass)
    traced = analysis.traced
    behind = ancestors(traced.output, node) - {node}
    size = traced.info[traced.input].shape
    assert size is not None  # the image is a tensor
    image = size[1:]
    _check_same(analysis.classifier, _halves(analysis.classifier, layer, image), layer, image)
    split = _halves(classifier, layer, image)
    share = total_operations(traced, ancestors(node)) / total_operations(traced, set(traced.info))
    names = [traced.path(n) for n in traced.graph.nodes if n in behind and _kind(traced, n).startswith(_RENORMALISING)]
    return CutPoint(split, analysis, node, share, tuple(names), layer)


_AS_GOOD, _HOPELESS = 1.25, 30.0


def automatic_cut(analysis: Analysis, classifier: Classifier) -> CutPoint:
    """Return the cut with the best predicted radius for its cost.

    A radius is that of the latent over the encoder's bound, so the smallest bound is the best; among cuts with a bound within a
    quarter of it, the one whose head is cheapest is taken, as the head alone runs for every sample. The search ends where bounds
    have grown to 30 times the smallest. A cut with nothing but the logits behind it is left out: noise there would meet no
    network.

    Raises:
        UnsupportedLayerError: no cut has a finite bound; names the first layer without one.
    """
    traced, found = analysis.traced, list[tuple[float, float, str]]()
    whole = total_operations(traced, set(traced.info))
    for layer, node in analysis.cut_nodes().items():
        share = total_operations(traced, ancestors(node)) / whole
        if node not in analysis.values or node is traced.output:
            continue
        constant = analysis.constant(node)
        if math.isfinite(constant) and constant > 0:
            found.append((constant, share, layer))
            if constant > _HOPELESS * min(found)[0]:
                break
    if found:
        limit = _AS_GOOD * min(found)[0]
        good = sorted((each for each in found if each[0] <= limit), key=lambda each: (-each[1], each[0]))
        rest = sorted(each for each in found if each[0] > limit)
        for _, _, layer in (*good, *rest):
            try:
                return cut(analysis, classifier, layer)
            except RspluginsError as error:
                failure = error
        raise failure
    analysis.constant(traced.output)  # says which layer stands first
    raise UsageError(
        "No layer's output carries everything and has a finite Lipschitz bound, so there is nowhere to cut.",
        fix="Use a certifier that needs no cut, such as 'gaussian'.",
    )


def _kind(traced: Traced, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(traced.root.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _node(analysis: Analysis, classifier: Classifier, layer: str) -> fx.Node:
    nodes = analysis.traced.outputs.get(layer, [])
    if len(nodes) == 1:
        if analysis.traced.info[nodes[0]].shape is None:
            raise UsageError(
                f"Layer {layer!r} does not return one tensor.", fix=f"Cut at another layer: {_suggestions(analysis)}."
            )
        return nodes[0]
    if len(nodes) > 1:
        raise UsageError(
            f"Layer {layer!r} is called {len(nodes)} times, so a cut behind it is not one place.",
            fix=f"Cut at another layer: {_suggestions(analysis)}.",
        )
    inside = next((path for path in analysis.traced.opaque if layer.startswith(f"{path}.")), None)
    if inside is not None:
        raise UsageError(
            f"Layer {layer!r} lies inside {inside!r}, which torch.fx cannot trace: {analysis.traced.opaque[inside]}.",
            fix=f"Cut at another layer: {_suggestions(analysis)}.",
        )
    modules = dict(classifier.module.named_modules())
    if layer in modules:
        raise UsageError(
            f"Layer {layer!r} is not run on the way to the logits.", fix=f"Cut at another layer: {_suggestions(analysis)}."
        )
    known = [path for path in modules if path]
    raise UnknownNameError("layer", layer, known, fix=f"Layers that can be cut at: {_suggestions(analysis)}.")


def _suggestions(analysis: Analysis, near: fx.Node | None = None) -> str:
    cuts = analysis.cut_nodes()
    names = list(cuts)
    if near is not None:
        order = {node: i for i, node in enumerate(analysis.traced.graph.nodes)}
        names.sort(key=lambda name: abs(order[cuts[name]] - order[near]))
    return ", ".join(repr(name) for name in names[:6]) or "none: no layer's output carries everything"


def _multi_input(analysis: Analysis, layer: str, node: fx.Node, bypass: tuple[fx.Node, fx.Node]) -> UsageError:
    traced = analysis.traced
    source, user = traced.path(bypass[0]), traced.path(bypass[1])
    return UsageError(
        f"The network cannot be cut at {layer!r}: the head would need {source!r} as well, which meets it again at {user!r}.",
        cause="the cut lies inside a residual branch, or a skip connection crosses it. Noise on one of two inputs of the head "
        "would not be noise on the latent, so the radius would not hold.",
        fix=f"Cut where one tensor carries everything: {_suggestions(analysis, node)}.",
    )


def _halves(classifier: Classifier, layer: str, size: tuple[int, ...]) -> Split:
    """Return the halves as modules that share the weights, in which every layer that does not contain the cut runs as it is."""
    path = layer if layer == PREPROCESS else f"module.{layer}"
    root = Pipeline(classifier).eval()
    tracer = Tracer(lambda _, inner: not path.startswith(f"{inner}."), size)
    graph = tracer.trace(root)
    nodes = tracer.outputs[layer]
    start = next(node for node in graph.nodes if node.op == "placeholder")
    end = next(node for node in graph.nodes if node.op == "output").all_input_nodes[0]
    return Split(_part(root, graph, start, nodes[0]), _part(root, graph, nodes[0], end))


def _part(root: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node) -> nn.Module:
    """Return the nodes from ``start`` (which becomes the input) to ``end`` as a module."""
    part = fx.Graph()
    copies = {start: part.placeholder("x")}
    needed = ancestors(end, start)
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(copies[end])
    return fx.GraphModule(root, part).eval()


def _check_same(classifier: Classifier, split: Split, layer: str, size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((3, *size), generator=generator).to(classifier.device)
    with torch.no_grad():
        whole = classifier(images)
        try:
            halves = split.head(split.encoder(images))
        except Exception as error:
            raise RspluginsError(
                f"The halves of the cut at {layer!r} do not run on a batch of three images: {str(error).splitlines()[0]}",
                cause="the network uses its batch size as a number.",
                fix="Cut at another layer.",
            ) from error
    scale = float(whole.abs().nan_to_num(0.0, 0.0, 0.0).max())
    if whole.shape == halves.shape and torch.allclose(whole, halves, rtol=1e-4, atol=1e-5 * max(1.0, scale), equal_nan=True):
        return
    gap = float((whole - halves).abs().max()) if whole.shape == halves.shape else math.nan
    raise RspluginsError(
        f"head(encoder(x)) differs from the whole network by {gap:.3g} at the cut {layer!r}.",
        cause="the network's forward depends on something that tracing does not see: the batch, random numbers, a global state.",
        fix="Cut at another layer, or make forward a pure function of its input.",
    )
