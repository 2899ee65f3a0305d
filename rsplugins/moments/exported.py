r"""The walk over torch.export's graph, for models that auto-LiRPA does not trace: an operator without a rule is linearised.

Every node has a mean, a low-rank factor and a diagonal, from which its marginal variances are read, and a tangent: a linear
function of all the noise that entered so far, so that the covariance of the logits is one backward pass a class
(see :mod:`rsplugins.moments.low_rank`). An operator f of random inputs without a rule of its own is replaced by its linear
part at the mean, :math:`f(m) + Df(m)(x - m)`: the covariance is :math:`Df\,S\,Df^T`, right to first order, and nothing is added
for the curvature (the delta method). Such operators are named in the evidence.

One image at a time: shapes are then all constants, and nothing depends on how a model writes its batch dimension.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rsplugins.aten.graph import attribute, check_graph, exported, last_uses, name_of
from rsplugins.double import bring, brought, copied
from rsplugins.errors import OutputValueError, ParameterError
from rsplugins.lirpa.graph import check_deployed
from rsplugins.moments.activations import Activation, Clip, Gelu, LeakyRelu
from rsplugins.moments.claims import KEPT
from rsplugins.moments.gaussian import larger
from rsplugins.moments.low_rank import directions
from rsplugins.moments.network import LogitGaussian, check_sigma, without_casts

_PROBES = 16
"""Random signs by which the variances behind a linearised operator are estimated where they are independent before it."""

_POINTS = 2**21
"""Values of an activation whose moments are computed at once: a quadrature has 64 nodes for each."""

aten = torch.ops.aten
Operator: TypeAlias = Any
Function: TypeAlias = Callable[..., Tensor]


@dataclass
class _Node:
    """A random tensor of any shape S.

    Attributes:
        mean: S.
        factor: (r, *S); the covariance is factor^T factor + diag(diagonal), as far as marginals are concerned.
        diagonal: S.
        tangent: S, zeros that depend linearly on all noise so far.
    """

    mean: Tensor
    factor: Tensor
    diagonal: Tensor
    tangent: Tensor

    @property
    def variance(self) -> Tensor:
        return self.factor.square().sum(0) + self.diagonal


class ExportedNetwork:
    """A model as torch.export sees it, that answers "what becomes of N(x, sigma^2 I)?"; see the module.

    Args:
        model: a Classifier or any module from (1, ...) to (1, K), in eval mode where that matters.
        example: one or more inputs, for their shape.
        dtype: in which it is propagated; a copy of the model is made.
        rank: columns of the factor.

    Attributes:
        linearised: names of the operators without a rule, sorted; ``"the whole network"`` where torch.export cannot trace it.

    Raises:
        UsageError: dropout or batch normalisation in training mode, or a forward that is no function of its input.
        ParameterError: the graph computes something else than the model.
        CheckpointError: weights that are not finite.

    Example:
        >>> found = ExportedNetwork(nn.Linear(3, 2), torch.rand(1, 3)).propagate(torch.rand(5, 3), 0.25)
        >>> found.mean.shape, found.covariance.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """

    def __init__(self, model: nn.Module, example: Tensor, *, dtype: torch.dtype = torch.float64, rank: int = 64) -> None:
        check_deployed(model, example)
        model = without_casts(brought(copied(model), dtype)).requires_grad_(False)
        tensors = (*model.parameters(), *model.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), example)
        self.dtype, self.device, self.rank = dtype, like.device, rank
        example = bring(example[:1].detach(), self.device, dtype).clone()
        self._graph = exported(model, example)
        check_graph(self._graph, model, example, "Nothing was estimated.")
        self._whole = model
        self._used = {} if self._graph is None else last_uses(self._graph)
        self._named: dict[str, None] = {}
        self.inputs = example.numel()
        self.largest = max(self._sizes(example))

    @property
    def linearised(self) -> list[str]:
        """Names of the operators that the last propagation linearised."""
        return sorted(self._named)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """As :attr:`rsplugins.moments.network.MomentNetwork.sizes`: the largest node stands for all."""
        return [(self.inputs, self.largest)]

    def propagate(self, images: Tensor, sigma: float) -> LogitGaussian:
        """Propagate N(x, sigma^2 I) for every image x, one after the other.

        Above :data:`rsplugins.moments.claims.KEPT` classes, the covariance of those with the largest means is exact for the
        linear function of the noise; that of the others is read from the factor.

        Raises:
            ParameterError: sigma is not above 0, or the logits do not depend on the input.
            OutputValueError: moments that are not finite.
        """
        check_sigma(sigma)
        found = [self._one(image, sigma) for image in bring(images, self.device, self.dtype).unsqueeze(1)]
        mean, covariance = torch.cat([mean for mean, _ in found]), torch.stack([table for _, table in found])
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise OutputValueError(
                "The propagated moments are not finite.", cause="weights or activations so large that their squares overflow."
            )
        return LogitGaussian(mean, covariance)

    def _sizes(self, example: Tensor) -> list[int]:
        found = [example.numel()]
        for node in self._graph.graph.nodes if self._graph is not None else ():
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                found.append(value.numel())
        return found

    def _one(self, image: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        self._named.clear()
        walk = _Walk(self.rank, self._named)
        start = walk.start(image, sigma)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            whole = self._graph is None
            last = walk.linearised("the whole network", self._whole, [start]) if whole else self._run(walk, start)
        if not isinstance(last, _Node):
            raise ParameterError("The model's output does not depend on its input.", fix="Check its forward().")
        return last.mean, walk.covariance(last)

    def _run(self, walk: _Walk, start: _Node) -> Any:
        assert self._graph is not None
        values: dict[fx.Node, Any] = {}
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = start
            elif node.op == "get_attr":
                values[node] = attribute(self._graph, str(node.target))
            elif node.op == "output":
                found = fx.node.map_arg(node.args[0], lambda each: values[each])
                return found[0] if isinstance(found, (tuple, list)) else found
            else:
                values[node] = walk.step(
                    node, fx.node.map_arg(node.args, values.__getitem__), fx.node.map_arg(node.kwargs, values.__getitem__)
                )
            for done in self._used.get(node, ()):
                del values[done]
        return None


class _Walk:
    """One image on its way through the graph."""

    def __init__(self, rank: int, named: dict[str, None]) -> None:
        self._rank, self._named = rank, named
        self._noises: list[tuple[Tensor, Tensor]] = []
        self._signs = torch.Generator().manual_seed(0)

    def start(self, mean: Tensor, sigma: float) -> _Node:
        size = mean.numel()
        rank = min(self._rank, size)
        rows = bring(directions(rank, size, 0), mean.device, mean.dtype)
        factor = math.sqrt(size / rank) * sigma * rows
        return _Node(mean, factor.view(-1, *mean.shape), torch.zeros_like(mean), self._noise(torch.full_like(mean, sigma**2)))

    def _noise(self, variance: Tensor) -> Tensor:
        with torch.enable_grad():
            entry = torch.zeros_like(variance, memory_format=torch.contiguous_format).requires_grad_()
        self._noises.append((entry, variance))
        return entry

    def covariance(self, node: _Node) -> Tensor:
        """Return the covariance (K, K) of the logits."""
        factor = node.factor.flatten(1)
        mean = node.mean.flatten()
        table = factor.t() @ factor + torch.diag(node.diagonal.flatten())
        kept = mean.argsort(descending=True, stable=True)[:KEPT]
        rows = []
        for k in kept.tolist():
            with torch.enable_grad():
                one = node.tangent.flatten()[k]
            found = torch.autograd.grad(one, [entry for entry, _ in self._noises], retain_graph=True, allow_unused=True)
            rows.append(found)
        exact = torch.zeros(len(kept), len(kept), dtype=mean.dtype, device=mean.device)
        for place, (entry, variance) in enumerate(self._noises):
            parts = [torch.zeros_like(entry) if row[place] is None else row[place] for row in rows]
            jacobian = torch.stack([part.flatten() for part in parts])
            exact += (jacobian * variance.flatten()) @ jacobian.t()
        if len(kept) == len(mean):
            table = torch.empty_like(table)
        else:
            # Differences between a class of either kind keep at least the variance that the factor gives them.
            less = (table[kept[0], kept[0]] - exact[0, 0]).clamp(min=0)
            table = table + torch.diag(torch.ones_like(mean) * less)
        table[kept.unsqueeze(1), kept] = 0.5 * (exact + exact.t())
        return table

    def step(self, node: fx.Node, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what an operator makes of constants and random nodes."""
        target: Operator = node.target
        flat, put_back = _random(arguments, options)
        if target is operator.getitem:
            return arguments[0][arguments[1]]
        if not flat:
            return target(*arguments, **options)
        name = name_of(node)

        def function(*values: Tensor) -> Any:
            args, kwargs = put_back(values)
            return target(*args, **kwargs)

        if name in _SHAPES:
            return function(*(each.mean for each in flat))
        known = _RULES.get(name)
        if known is not None:
            found = known(self, _Call(name, target, function, flat, arguments, options))
            if found is not None:
                return found
        return self.linearised(name, function, flat)

    def linear(self, call: _Call, squared: Function | None = None) -> Any:
        """Return a map that is affine in all random inputs together.

        Args:
            call: the operator.
            squared: the variances of the outputs, of those of independent inputs; by the map itself where None.
        """
        zero = call.function(*(torch.zeros_like(each.mean) for each in call.random))
        if not isinstance(zero, Tensor):
            return self._several(call, zero)

        def part(*values: Tensor) -> Tensor:
            found: Tensor = call.function(*values)
            return found - zero

        factor = _over_columns(part, [each.factor for each in call.random])
        with torch.enable_grad():
            tangent = part(*(each.tangent for each in call.random))
        diagonals = [each.diagonal for each in call.random]
        diagonal = part(*diagonals) if squared is None else squared(*diagonals)
        return _Node(call.function(*(each.mean for each in call.random)), factor, diagonal.clamp(min=0), tangent)

    def _several(self, call: _Call, outputs: Sequence[Tensor]) -> list[_Node]:
        """Split and its like: each output alone, as they only move values."""

        def one(place: int) -> Function:
            return lambda *values: call.function(*values)[place]

        return [self.linear(replace(call, function=one(place))) for place in range(len(outputs))]

    def activation(self, node: _Node, activation: Activation) -> _Node:
        """Return f(x), elementwise, by its moments."""
        variance = node.variance
        pieces = (torch.split(values.flatten(), _POINTS // 64) for values in (node.mean, variance))
        flat = [activation.moments(m, v) for m, v in zip(*pieces, strict=True)]
        mean, spread, slope = (torch.cat([part[i] for part in flat]).view_as(node.mean) for i in range(3))
        lacking = (spread - slope.square() * variance).clamp(min=0)
        with torch.enable_grad():
            tangent = slope * node.tangent + self._noise(lacking)
        return _Node(mean, slope * node.factor, slope.square() * node.diagonal + lacking, tangent)

    def product(self, one: _Node, two: _Node) -> _Node:
        r"""Return x y of jointly Gaussian x, y: E = m_x m_y + c, and a variance of v_x v_y + c^2 above the linear part's."""
        between = (one.factor * two.factor).sum(0)
        if one is two:
            between = one.variance
        lacking = one.variance * two.variance + between.square()
        diagonal = two.mean.square() * one.diagonal + one.mean.square() * two.diagonal + lacking
        with torch.enable_grad():
            tangent = two.mean * one.tangent + one.mean * two.tangent + self._noise(lacking)
        factor = two.mean * one.factor + one.mean * two.factor
        return _Node(one.mean * two.mean + between, factor, diagonal, tangent)

    def maximum(self, one: _Node, two: _Node, both: Tensor) -> _Node:
        """Return the larger of two nodes by Clark's formulas; the first where ``both`` is false."""
        found = larger(one.mean, one.variance, two.mean, two.variance, (one.factor * two.factor).sum(0))
        first = torch.where(both, found.first, torch.ones_like(found.first))
        second = 1 - first
        diagonal = first.square() * one.diagonal + second.square() * two.diagonal
        factor = first * one.factor + second * two.factor
        lacking = torch.where(both, (found.variance - factor.square().sum(0) - diagonal).clamp(min=0), torch.zeros_like(first))
        with torch.enable_grad():
            tangent = first * one.tangent + second * two.tangent + self._noise(lacking)
        return _Node(torch.where(both, found.mean, one.mean), factor, diagonal + lacking, tangent)

    def linearised(self, name: str, function: Function, nodes: Sequence[_Node]) -> Any:
        """Return an operator's linear part at the mean; named."""
        self._named[name] = None
        means = [each.mean for each in nodes]
        value = function(*means)
        if isinstance(value, (tuple, list)):
            return [
                self.linearised(name, lambda *v, place=place: function(*v)[place], nodes)
                if isinstance(each, Tensor) and each.is_floating_point()
                else each
                for place, each in enumerate(value)
            ]
        if not value.is_floating_point():
            return value  # comparisons and indices, taken at the mean
        push = _differential(function, means)
        factor = _over_columns(push, [each.factor for each in nodes])
        scales = [each.diagonal.sqrt() for each in nodes]
        signs = [
            torch.randint(0, 2, (_PROBES, *scale.shape), generator=self._signs).to(scale) * 2 - 1 if bool(scale.any()) else None
            for scale in scales
        ]
        diagonal = torch.zeros_like(value)
        if any(sign is not None for sign in signs):
            probes = [
                torch.zeros(_PROBES, *scale.shape, dtype=scale.dtype) if sign is None else sign * scale
                for sign, scale in zip(signs, scales, strict=True)
            ]
            diagonal = _over_columns(push, probes).square().mean(0)
        with torch.enable_grad():
            tangent = push(*(each.tangent for each in nodes))
        return _Node(value, factor, diagonal, tangent)


def _differential(function: Function, means: list[Tensor]) -> Function:
    """Return (directions) -> Df(means) directions, differentiable with respect to the directions."""

    def forward(*tangents: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(function, tuple(means), tuple(tangents))[1]
        return found

    def twice(*tangents: Tensor) -> Tensor:
        # The derivative of the backward pass by its own argument, for operators that have no forward mode.
        with torch.enable_grad():
            at = [mean.detach().clone().requires_grad_() for mean in means]
            value = function(*at)
            weight = torch.zeros_like(value, requires_grad=True)
            back = torch.autograd.grad(value, at, weight, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(back, tangents, strict=True) if g is not None]
            if not pairs:
                return torch.zeros_like(value)
            keep = any(tangent.requires_grad for tangent in tangents)
            total = torch.stack([(g * t).sum() for g, t in pairs]).sum()
            (found,) = torch.autograd.grad(total, weight, create_graph=keep, retain_graph=True, allow_unused=True)
        return torch.zeros_like(value) if found is None else found

    try:
        forward(*(torch.zeros_like(mean) for mean in means))
    except (RuntimeError, NotImplementedError):
        return twice
    return forward


def _over_columns(function: Function, columns: Sequence[Tensor]) -> Tensor:
    """Return the function of each column of the inputs, (r, *S) to (r, *out)."""
    try:
        found: Tensor = torch.vmap(function)(*columns)
        return found
    except (RuntimeError, ValueError, NotImplementedError):  # an operator without a batching rule
        return torch.stack([function(*each) for each in zip(*columns, strict=True)])


@dataclass
class _Call:
    """An operator as rules see it.

    Attributes:
        name: of aten, without the overload.
        target: the operator.
        function: of the random inputs alone.
        random: those.
        arguments: all, by position.
        options: all, by keyword.
    """

    name: str
    target: Operator
    function: Function
    random: Sequence[_Node]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.arguments[place] if place < len(self.arguments) else self.options.get(name, default)


def _random(
    arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[list[_Node], Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return the random nodes among the arguments, each once for each place, and what puts tensors in their places."""
    leaves, spec = torch.utils._pytree.tree_flatten((arguments, options))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _Node)]

    def put_back(values: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        found: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_unflatten(filled, spec)
        return found

    return [leaves[place] for place in places], put_back


# Rules. Each returns None where it does not account for how the operator is called, which is linearised then.

Rule: TypeAlias = Callable[[_Walk, _Call], Any]


def _moved(walk: _Walk, call: _Call) -> Any:
    """Operators that only move values, or repeat them: the variances move with them."""
    return walk.linear(call)


def _weighted(walk: _Walk, call: _Call) -> Any:
    """Convolutions and products with constant weights, the bias apart: variances by the squared weights."""
    if len(call.random) != 1 or isinstance(call.arguments[1], _Node):
        return None
    weight, rest = call.arguments[1], (None, *call.arguments[3:]) if len(call.arguments) > 2 else ()
    options = {key: value for key, value in call.options.items() if key != "bias"}
    return walk.linear(call, lambda v: call.target(v, weight.square(), *rest, **options))


def _product(walk: _Walk, call: _Call) -> Any:
    """Products and quotients of a node with a constant, and of two nodes."""
    first, second = call.arguments[:2]
    if isinstance(first, _Node) and isinstance(second, _Node):
        if call.target not in (aten.mul.Tensor, aten.mul_.Tensor):
            return None
        return walk.product(first, second)
    if not isinstance(first, _Node) and "div" in str(call.target):
        return None
    factor = call.target(torch.ones((), dtype=call.random[0].mean.dtype), second if isinstance(first, _Node) else first)
    return walk.linear(call, lambda v: v * factor.square())


def _sum_of(walk: _Walk, call: _Call) -> Any:
    """Sums and differences; ``alpha`` multiplies the second."""
    second = float(call.options.get("alpha", 1)) ** 2
    scales = [second if each is not call.arguments[0] else 1.0 for each in call.arguments[:2] if isinstance(each, _Node)]
    shape = call.function(*(each.mean for each in call.random)).shape

    def squared(*variances: Tensor) -> Tensor:
        return sum((scale * v for scale, v in zip(scales, variances, strict=True)), torch.zeros(())).expand(shape)

    return walk.linear(call, squared)


def _mean_of(walk: _Walk, call: _Call) -> Any:
    """Means and average pooling: of k inputs, the variance is a k-th of the mean of the variances."""
    (node,) = call.random
    out = call.function(node.mean)
    if call.name == "avg_pool2d":
        kernel = call.argument(1, "kernel_size")
        taps = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** 2
    else:
        taps = max(1, node.mean.numel() // max(out.numel(), 1))
    return walk.linear(call, lambda v: call.function(v) / taps)


def _total(walk: _Walk, call: _Call) -> Any:
    """Sums over dimensions."""
    return walk.linear(call)


def _normalised(walk: _Walk, call: _Call) -> Any:
    """Batch normalisation with stored statistics."""
    _, weight, bias, mean, variance, *rest = call.arguments
    training, eps = (False, rest[1]) if call.name.startswith("_native") else (rest[0], rest[2])
    if training or len(call.random) != 1 or mean is None or variance is None:
        return None
    factor = (1 if weight is None else weight) / (variance + eps).sqrt()
    shape = (1, -1, *(1,) * (call.random[0].mean.dim() - 2))
    offset = (0 if bias is None else bias) - mean * factor
    # Written out: torch has no batching rule for the operator.
    affine = replace(call, function=lambda x: x * factor.view(shape) + offset.view(shape))
    found = walk.linear(affine, lambda v: v * factor.square().view(shape))
    return [found] if call.name.startswith("_native") else found  # it returns what training keeps as well


def _largest(walk: _Walk, call: _Call) -> Any:
    """Max pooling in two dimensions, the places of a window folded in one after the other."""
    (node,) = call.random
    kernel, stride, padding, dilation, ceil = (
        call.argument(place, name, default)
        for place, (name, default) in enumerate(
            [("kernel_size", None), ("stride", []), ("padding", [0]), ("dilation", [1]), ("ceil_mode", False)], 1
        )
    )
    size, step, border, apart = (
        tuple(each) * 2 if len(each) == 1 else tuple(each) for each in (kernel, stride or kernel, padding, dilation)
    )
    if ceil or node.mean.dim() != 4:
        return None
    index = torch.arange(1, node.mean.numel() + 1, dtype=torch.float64).view(node.mean.shape[1], 1, *node.mean.shape[2:])
    if len(node.mean) != 1:
        return None
    windows = torch.nn.functional.unfold(index, size, apart, border, step).round().long() - 1
    views = [view.flatten() for view in windows.permute(1, 0, 2)]
    shape = call.function(node.mean).shape
    # A window's places in an order in which the first is never outside the image: the one in its middle.
    views.insert(0, views.pop(len(views) // 2))
    if bool((views[0] < 0).any()):
        return None

    def seen(places: Tensor) -> _Node:
        places = places.clamp(min=0)
        with torch.enable_grad():
            tangent = node.tangent.flatten()[places]
        return _Node(node.mean.flatten()[places], node.factor.flatten(1)[:, places], node.diagonal.flatten()[places], tangent)

    best = seen(views[0])
    for places in views[1:]:
        best = walk.maximum(best, seen(places), places >= 0)
    with torch.enable_grad():
        tangent = best.tangent.view(shape)
    return _Node(best.mean.view(shape), best.factor.view(-1, *shape), best.diagonal.view(shape), tangent)


def _clipped(walk: _Walk, call: _Call) -> Any:
    low, high = (call.argument(place, name) for place, name in ((1, "min"), (2, "max")))
    if any(isinstance(end, (Tensor, _Node)) for end in (low, high)):
        return None
    return walk.activation(call.random[0], Clip(-math.inf if low is None else low, math.inf if high is None else high))


def _hard(walk: _Walk, call: _Call) -> Any:
    low, high = call.argument(1, "min_val", -1), call.argument(2, "max_val", 1)
    return walk.activation(call.random[0], Clip(float(low), float(high)))


def _leaky(walk: _Walk, call: _Call) -> Any:
    slope = float(call.argument(1, "negative_slope", 0.01))
    return walk.activation(call.random[0], LeakyRelu(slope)) if slope <= 1 else None


def _by_quadrature(walk: _Walk, call: _Call) -> Any:
    """Any elementwise function of one random input; its settings are constants."""
    if len(call.random) != 1:
        return None
    if call.name == "gelu" and call.options.get("approximate", "none") == "none":
        return walk.activation(call.random[0], Gelu())
    return walk.activation(call.random[0], Activation(lambda x: call.function(x)))


def _hard_sigmoid(walk: _Walk, call: _Call) -> Any:
    """Clip of x + 3 to [0, 6], over 6."""
    (node,) = call.random
    shifted = _Node(node.mean + 3, node.factor, node.diagonal, node.tangent)
    found = walk.activation(shifted, Clip(0.0, 6.0))
    with torch.enable_grad():
        return _Node(found.mean / 6, found.factor / 6, found.diagonal / 36, found.tangent / 6)


MOVING = frozenset(
    "view reshape _unsafe_view permute transpose t flatten unflatten squeeze unsqueeze slice select expand expand_as split "  # noqa: SIM905
    "split_with_sizes chunk unbind narrow clone contiguous alias detach _to_copy to roll flip index index_select gather "
    "pad constant_pad_nd cat stack repeat pixel_shuffle pixel_unshuffle channel_shuffle lift_fresh_copy dropout "
    "view_as reshape_as swapaxes movedim tile repeat_interleave as_strided hsplit vsplit".split()
)
"""Operators of aten that move values, repeat them or put constants beside them."""

ELEMENTWISE = frozenset(
    "gelu silu sigmoid tanh hardswish mish softplus elu selu celu erf exp hardshrink softshrink softsign square sin cos".split()  # noqa: SIM905
)
"""Elementwise functions whose moments are taken by quadrature, but for GELU's mean and slope, which are exact."""

_SHAPES = frozenset(
    ("sym_size", "size", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)

_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVING, _moved),
    **dict.fromkeys(ELEMENTWISE, _by_quadrature),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _weighted),
    **dict.fromkeys(("matmul", "mm", "bmm"), _weighted),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("add", "sub"), _sum_of),
    **dict.fromkeys(("mean", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"), _mean_of),
    "sum": _total,
    "neg": _moved,
    "batch_norm": _normalised,
    "_native_batch_norm_legit_no_training": _normalised,
    "max_pool2d": _largest,
    "relu": lambda walk, call: walk.activation(call.random[0], LeakyRelu()),
    "leaky_relu": _leaky,
    "relu6": lambda walk, call: walk.activation(call.random[0], Clip(0.0, 6.0)),
    "hardtanh": _hard,
    "clamp": _clipped,
    "clamp_min": _clipped,
    "hardsigmoid": _hard_sigmoid,
}
"""By the name of aten's operator, without its overload."""


def known_operators() -> list[str]:
    """Return the names of the operators that have a rule, sorted."""
    return sorted(_RULES)
