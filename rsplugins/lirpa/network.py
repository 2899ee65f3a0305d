"""Bounds of a classifier's outputs over a ball of raw pixels, by any of auto-LiRPA's methods."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.arithmetic import full_precision
from rsplugins.arithmetic import rounding_error as error
from rsplugins.certificate import Norm
from rsplugins.chain import computes_as
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.double import bring, brought, copied
from rsplugins.errors import ParameterError, RspluginsError
from rsplugins.lirpa.backward import OutwardLinear
from rsplugins.lirpa.bridge import Operators, quiet
from rsplugins.lirpa.claims import SLACK
from rsplugins.lirpa.diagnosis import unsupported
from rsplugins.lirpa.graph import bounded, check_deployed, check_method, check_slopes, identity
from rsplugins.lirpa.outward import Outward, plain_convolutions
from rsplugins.lirpa.probe import probe
from rsplugins.lirpa.resizing import View, resize_layers
from rsplugins.lirpa.slopes import optimised
from rsplugins.machine import cache
from rsplugins.machine.device import is_out_of_memory
from rsplugins.machine.progress import step
from rsplugins.provenance import versions

ORDERS = {Norm.LINF: math.inf, Norm.L2: 2.0, Norm.L1: 1.0}
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
"""auto-LiRPA's methods, loosest and cheapest first."""


class BoundNetwork:
    """A model, traced once, that answers "between what and what are its outputs over this ball?".

    A Classifier's normalisation is not traced: the ball is mapped through it instead. Boxes map exactly. The image of an l2 or l1
    ball under a different scale for each channel lies in the ball of radius eps / min(std), which is what is bounded. This keeps
    the first layer next to the input, which is where interval bounds of l2 and l1 balls are tight, and where auto-LiRPA's
    propagation of them is sound: it drops the ball at a subtraction. A Classifier's resizing, for which auto-LiRPA has no bounds,
    becomes the linear layer that it is, behind the normalisation: bilinear weights sum to 1, so the two commute.

    Everything is computed in full precision, whatever autocast or TF32 the caller is in.

    Args:
        model: a Classifier or any module from (B, ...) to (B, K), in eval mode where that matters.
        example: one or more raw inputs, for their shape.
        operators: custom operators of this network alone; see :func:`rsplugins.lirpa.graph.bounded`.
        dtype: when given, a copy of the model in this dtype is bounded, and the bounds are rounded outward, as claims need them,
            unless they are estimates; see :mod:`rsplugins.lirpa.outward`. Otherwise it is the model itself, its parameters
            shared, so that bounds can be trained through, as they come out of floating point.
        explain: whether a refusal to trace the network names the layer, which is searched for.
        iterations: of ``alpha-crown``, at most; for lower bounds alone it stops earlier, see :mod:`rsplugins.lirpa.slopes`.

    Raises:
        UsageError, CheckpointError, ParameterError: see :func:`rsplugins.lirpa.graph.bounded`; also a Classifier that a
            subclass or a hook changes, and a leaky ReLU whose slope lies outside [0, 1].
    """

    @full_precision()
    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        operators: Operators | None = None,
        dtype: torch.dtype | None = None,
        iterations: int = 20,
        explain: bool = True,
    ) -> None:
        if dtype is not None:
            check_deployed(model, example)
            model = brought(copied(model), dtype)
        parameter = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), example)
        self.dtype, self.device = dtype or parameter.dtype, parameter.device
        self._iterations, self._explain = iterations, explain
        self._model, self._raw = model, bring(example[:1].detach(), self.device, self.dtype)
        self._module, self._mean, self._std = _split(model, example, self.dtype, self.device)
        self._operators: Operators = {} if operators is None else operators  # an empty one still says why
        self._example = self._normalise(bring(example[:1], self.device, self.dtype))
        reshapes = any(isinstance(layer, View) for layer in self._module.modules())
        self._claims, self._outward = dtype is not None, dict[int, Outward]()
        self.graph = self._bounded(matrices=reshapes)
        self._of_matrices: Any = None
        check_slopes(self._module, self.graph)
        self._starts_affine = _starts_affine(self.graph)
        # A plugin's operator is written for matrices; auto-LiRPA's patches are its own affair.
        self._matrices = _any_node_is(self.graph, "stranger")
        self._probed: set[tuple[str, Norm]] = set()
        # Before any bound is computed, which leaves its traces in the nodes; networks in training change at every step.
        self._identity = identity(self.graph, self._model) if self._claims else ""

    def _bounded(self, *, matrices: bool) -> Any:
        with step("tracing the network for auto-LiRPA"):
            graph = bounded(self._module, self._example, self._operators, matrices=matrices, explain=self._explain)
        if self._claims and not _any_node_is(graph, "estimate"):
            self._outward[id(graph)] = Outward(graph)
            OutwardLinear(self._outward[id(graph)])
        return graph

    @property
    def rounds_outward(self) -> bool:
        """Whether the bounds hold whatever their own rounding."""
        return bool(self._outward)

    @full_precision()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, K) in this network's dtype."""
        output: Tensor = self._module(self._normalise(bring(images, self.device, self.dtype)))
        return output

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
        """Return lower and upper bounds of the outputs over the ball of radius eps around each image.

        Args:
            images: (B, ...), raw pixels.
            eps: radius on raw pixels, >= 0; a number, or one for each image, shape (B,).
            norm: of the ball.
            method: one of :data:`METHODS`.
            clip: intersect the ball with the [0, 1] box. Exact for linf. For l2 and l1 the better of two sound bounds is taken:
                over the ball, and over the linf ball of the same radius intersected with the box.
            specification: (B, S, K); the bounds are then of specification @ logits. Without it, of the logits.
            upper: whether the upper bound is wanted; None stands in its place otherwise.

        Returns:
            lower (B, S or K) and upper of the same shape.

        Raises:
            ParameterError: eps below 0, an unknown method, a layer without bounds for it, or bounds that :meth:`check` refutes.
        """
        self.check(method, norm, clip=clip)
        arguments: dict[str, Any] = {"method": method, "specification": specification, "upper": upper}
        try:
            return self._bounds(images, eps, norm, clip, **arguments)
        except Exception as error:
            if not self._gives_up_patches(method, error):
                raise
        self.check(method, norm, clip=clip)
        return self._bounds(images, eps, norm, clip, **arguments)

    @full_precision()
    def check(self, method: str, norm: Norm = Norm.LINF, *, clip: bool = False) -> None:
        """Hold a method's bounds against the network itself, the first time that they are asked for in a norm.

        Raises:
            ParameterError: an unknown method, a layer without right bounds for it, or bounds that the network contradicts.
        """
        if method not in METHODS:
            raise ParameterError(f"There is no bound method {method!r}.", fix=f"Use one of: {', '.join(METHODS)}.")
        check_method(self._module, self.graph, method)
        # Where a box stands in for the ball, it is the box that is computed.
        norms = [norm if self._starts_affine else Norm.LINF, *([Norm.LINF] if clip else [])]
        for each in norms:
            if (method, each) not in self._probed:
                self._probe_once(method, each)
                self._probed.add((method, each))

    def _probe_once(self, method: str, norm: Norm) -> None:
        """Probe, unless an earlier process did so with the same network, method, norm, precision and releases."""
        known = self._identity
        key = (known, method, norm, self.dtype, self.device.type, self._claims, versions())
        if known and cache.recall("bounds-checks", *key) is True:
            return
        with step(f"holding bounds by {method} ({norm}) against the network"):
            self._probe(method, norm)
        if known:
            cache.keep(True, "bounds-checks", *key)

    def _probe(self, method: str, norm: Norm) -> None:
        def bounds(images: Tensor, eps: Tensor, specification: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(method == "alpha-crown"):
                low, high = self._bounds(images, eps, norm, False, method=method, specification=specification, upper=True)
            assert high is not None  # it was asked for
            return low, high

        def plain(images: Tensor, eps: Tensor, specification: Tensor) -> tuple[Tensor, Tensor]:
            with self._as_they_come():
                return bounds(images, eps, specification)

        options: dict[str, Any] = {"method": method, "estimate": _any_node_is(self.graph, "estimate"), "plain": plain}
        options["weights"] = sum(parameter.numel() for parameter in self._model.parameters())
        try:
            probe(self._model, bounds, self._raw, norm, **options)
        except Exception as error:
            halved = is_out_of_memory(error)
            if not halved and not self._gives_up_patches(method, error):
                raise
            probe(self._model, bounds, self._raw, norm, halved=halved, **options)

    @contextmanager
    def _as_they_come(self) -> Iterator[None]:
        """Leave the bounds as floating point gives them."""
        graphs = list(self._outward.values())
        for outward in graphs:
            outward.active = False
        try:
            yield
        finally:
            for outward in graphs:
                outward.active = True

    def _gives_up_patches(self, method: str, error: Exception) -> bool:
        """After a failure inside auto-LiRPA, turn to matrices for good, to be checked anew; False when that is no way out."""
        if self._matrices or method == "ibp" or is_out_of_memory(error) or isinstance(error, RspluginsError):
            return False
        self._matrices = True
        self._probed.clear()
        return True

    def _bounds(
        self,
        images: Tensor,
        eps: float | Tensor,
        norm: Norm,
        clip: bool,
        *,
        method: str,
        specification: Tensor | None,
        upper: bool,
    ) -> tuple[Tensor, Tensor | None]:
        images = bring(images, self.device, self.dtype)
        # A number by way of float64: in torch's default dtype, 0.01 is less than itself, and so would be the ball.
        radius = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64)
        radius = bring(radius, self.device, self.dtype).expand(len(images))
        if not bool((radius >= 0).all()):
            raise ParameterError(f"eps is {float(radius.min()):g}; expected a number of at least 0.")
        specification = None if specification is None else bring(specification, self.device, self.dtype)
        arguments = {"method": method, "specification": specification, "upper": upper}
        # A ball around a point lies in the box around it, so the box is always a sound stand-in.
        if norm is Norm.LINF or not self._starts_affine:
            return self._over_box(images, radius, clip, **arguments)
        found = self._over_ball(images, radius, norm, **arguments)
        return _tighter(found, self._over_box(images, radius, True, **arguments)) if clip else found

    def _over_box(self, images: Tensor, radius: Tensor, clip: bool, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        width = radius.view(-1, *(1,) * (images.dim() - 1))
        low, high = images - width, images + width
        if clip:
            # Inputs that lie outside the box themselves stay inside their own ball.
            low, high = torch.maximum(low, images.clamp(max=0)), torch.minimum(high, images.clamp(min=1))
        low, high = self._normalise(low), self._normalise(high)
        if self._outward:
            off = self._rounding_of_inputs(images.abs() + width)
            low, high = low - off, high + off
        ball = {"norm": math.inf, "eps": float(radius.max()), "x_L": low, "x_U": high}
        return self._compute((low + high) / 2, ball, **arguments)

    def _over_ball(self, images: Tensor, radius: Tensor, norm: Norm, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        scale = 1.0 if self._std is None else float(self._std.min())
        # auto-LiRPA takes one radius for a batch in these norms, so inputs of equal radius go together.
        lowers: dict[int, Tensor] = {}
        uppers: dict[int, Tensor] = {}
        specification = arguments.pop("specification")
        if self._outward:
            scale *= 1 - 8 * torch.finfo(self.dtype).eps
            off = self._rounding_of_inputs(images.abs()).flatten(1)
            # To the next power of 2, so that images of one range still go together.
            length = 2 * torch.linalg.vector_norm(off, ORDERS[norm], dim=1)
            radius = radius + scale * torch.exp2(torch.ceil(torch.log2(length))) + 8 * torch.finfo(self.dtype).eps * radius
        for value in sorted(set(radius.tolist())):
            rows = (radius == value).nonzero().flatten()
            part = None if specification is None else specification[rows]
            ball = {"norm": ORDERS[norm], "eps": value / scale}
            low, high = self._compute(self._normalise(images[rows]), ball, specification=part, **arguments)
            lowers.update(zip(rows.tolist(), low, strict=True))
            if high is not None:
                uppers.update(zip(rows.tolist(), high, strict=True))
        lower = torch.stack([lowers[row] for row in range(len(images))])
        return lower, torch.stack([uppers[row] for row in range(len(images))]) if uppers else None

    def _compute(
        self, center: Tensor, ball: dict[str, Any], *, method: str, specification: Tensor | None, upper: bool
    ) -> tuple[Tensor, Tensor | None]:
        lirpa = bridge_auto_lirpa()
        try:
            with quiet(), _default_dtype(self.dtype), plain_convolutions(self.dtype, self.rounds_outward):
                x = lirpa.BoundedTensor(center, lirpa.PerturbationLpNorm(**ball))
                graph = self._graph_for(ball["norm"], method)
                options = {"x": (x,), "C": specification, "bound_lower": True, "bound_upper": upper or method == "ibp"}
                enough = None if upper or method != "alpha-crown" else self._enough(center)
                with (
                    _company_ignored(graph, x) if method in ("crown", "alpha-crown") else nullcontext(),
                    optimised(graph, self._iterations, enough) if method == "alpha-crown" else nullcontext() as seen,
                ):
                    low, high = graph.compute_bounds(method=method, **options)
                low = low if seen is None else seen.tightened(low)
                if self._outward and method == "ibp":
                    low, high = self._outward[id(graph)].specified((low, high), specification)
        except RspluginsError:  # of a plugin, or an operator whose rounding is not known
            raise
        except Exception as error:
            # Whatever else fails with patches may work with matrices, and is tried with them first.
            final = self._matrices or method == "ibp" or isinstance(error, NotImplementedError)
            if is_out_of_memory(error) or not final:
                raise
            raise unsupported(self._module, self._example, self._operators, error, method) from error
        return low, high if upper else None

    def _enough(self, center: Tensor) -> Tensor:
        """Return what certifies a margin for sure, (B,): well above the slack that a claim in float32 leaves."""
        with torch.no_grad():
            logits: Tensor = self._module(center)
        return 10 * SLACK["float32"] * (1 + logits.abs().amax(1))

    def _graph_for(self, order: float, method: str) -> Any:
        # In release 0.3, linear bounds through patches fail where every neuron of a convolution is unstable, of l2 and l1 balls
        # above all.
        if method == "ibp" or (order == math.inf and not self._matrices):
            return self.graph
        if self._of_matrices is None:
            self._of_matrices = self._bounded(matrices=True)
        return self._of_matrices

    def _rounding_of_inputs(self, largest: Tensor) -> Tensor:
        """Return what a pixel is off by once it is converted, moved by eps and normalised, given its size before that."""
        trailing = (1,) * (largest.dim() - 2)
        if self._mean is not None:
            largest = largest + self._mean.abs().view(-1, *trailing)
        if self._std is not None:
            largest = largest / self._std.abs().view(-1, *trailing)
        return error(16, largest) * all(outward.active for outward in self._outward.values())

    def _normalise(self, images: Tensor) -> Tensor:
        trailing = (1,) * (images.dim() - 2)
        if self._mean is not None:
            images = images - self._mean.view(-1, *trailing)
        if self._std is not None:
            images = images / self._std.view(-1, *trailing)
        return images


@contextmanager
def _company_ignored(graph: Any, x: Any) -> Iterator[None]:
    """Have CROWN's bounds of what enters a ReLU intersected with interval bounds, in every pass that auto-LiRPA makes.

    Left to itself it bounds by CROWN the neurons that interval bounds leave unstable for any input of the batch, and takes
    the interval bounds of the others, although neither is always the tighter: an input's margins would depend on the others.
    """
    original = graph.compute_bounds
    with torch.no_grad():
        original(x=(x,), method="ibp")
    entering = {relu.inputs[0] for relu in graph.relus if relu.inputs[0].perturbed}

    def found() -> dict[str, list[Tensor]]:
        return {node.name: [node.lower.detach(), node.upper.detach()] for node in entering}

    known = found()

    def compute_bounds(*arguments: Any, reference_bounds: Any = None, aux_reference_bounds: Any = None, **options: Any) -> Any:
        if options.get("method") == "alpha-crown":
            return original(*arguments, **options)  # comes back here for each of its passes
        # The second says which neurons may be unstable. alpha-CROWN hands on its own, empty at first; its slopes, made just
        # before, are those of the neurons that are unstable by the last pass.
        may_be_unstable = found() if aux_reference_bounds == {} else aux_reference_bounds or dict(known)
        options |= {"reference_bounds": reference_bounds or known, "aux_reference_bounds": may_be_unstable}
        return original(*arguments, **options)

    graph.compute_bounds = compute_bounds
    try:
        yield
    finally:
        del graph.compute_bounds


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # Both releases make some constants in the default dtype and then mix them with the network's.
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


def _split(
    model: nn.Module, example: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """Take a Classifier apart into its network, resizing included, and its normalisation; leave other modules whole."""
    from rsplugins.classifier import Classifier

    if not isinstance(model, Classifier):
        return model, None, None
    if not computes_as(model, Classifier, "preprocess", "normalised"):
        raise ParameterError(
            f"The Classifier ({type(model).__name__}) computes more than its network and normalisation; it cannot be bounded.",
            cause="a subclass overrides forward(), preprocess() or normalised(), or a hook sits on the Classifier itself.",
            fix="Move that step into the network that is wrapped, where it is bounded with the rest.",
        )
    mean, std = (None if values is None else values.to(dtype) for values in (model.mean, model.std))
    if model.resize is None or tuple(example.shape[-2:]) == model.resize:
        return model.module, mean, std
    resizing = resize_layers(tuple(example.shape[1:]), model.resize).to(dtype).to(device)
    network = nn.Sequential(OrderedDict([*resizing.named_children(), ("module", model.module)]))
    network.training = model.module.training  # train() would reach the caller's layers
    return network, mean, std


def _starts_affine(graph: Any) -> bool:
    """Whether every path from the input meets a linear or convolution layer first, but for flattening."""
    from auto_LiRPA.bound_ops import BoundConv, BoundFlatten, BoundLinear, BoundReshape, BoundShape

    def good(name: str) -> bool:
        node = graph[name]
        if isinstance(node, (BoundFlatten, BoundReshape)):
            return bool(node.output_name) and all(good(following) for following in node.output_name)
        return isinstance(node, (BoundConv, BoundLinear, BoundShape))  # a shape carries no bounds

    roots = [graph[name] for name, index in zip(graph.input_name, graph.input_index, strict=True) if index is not None]
    return all(good(name) for root in roots for name in root.output_name)


def _tighter(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    upper = None if a[1] is None or b[1] is None else torch.minimum(a[1], b[1])
    return torch.maximum(a[0], b[0]), upper


def _any_node_is(graph: Any, what: str) -> bool:
    return any(getattr(node, what, False) for node in graph._modules.values())
