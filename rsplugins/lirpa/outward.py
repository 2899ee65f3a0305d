r"""Interval bounds that hold whatever the rounding: each node's interval is widened by a bound of its own rounding error.

A node computes its interval from its inputs' intervals in floating point. If those contain what they should, then so does the
result widened by a bound of the rounding of this one step; by induction so does the last one, however deep the network is. The
bounds are the standard ones (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3): a sum of n products, in any
order, is off by at most :math:`\gamma_n \sum |w||x|` with :math:`\gamma_n = n u / (1 - n u)` and u the unit roundoff. :math:`|x|`
is at most the larger end of its interval in size, centre and half-width included. The table of operators is closed: an operator
whose arithmetic it does not account for is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsplugins.arithmetic import growth
from rsplugins.arithmetic import rounding_error as error
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.errors import ParameterError
from rsplugins.lirpa.diagnosis import NotBoundedError

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import Interval  # noqa: E402

Bounds = tuple[Tensor, Tensor]
Count = tuple[int, Tensor]
"""How many roundings a value has behind it, at most, and the magnitude that they are relative to."""

_SPARE = 24
# Roundings of one node besides its sum: centre and half-width, their sum with the bias, the bound's own computation, the weights'
# conversion to the format of the bounds, and the last addition of the bound itself.

_ULPS = 16
# Of an elementary function: the libraries' own are within 1 to 2 of the exact value, on processors and GPUs.


def size(interval: Any) -> Tensor:
    """Return the largest absolute value in an interval, elementwise; of an l2 or l1 ball, its centre's plus the radius."""
    low, high = interval
    if not (isinstance(low, Tensor) and low.is_floating_point()):
        counted: Tensor = low  # shapes, axes and indices
        return counted
    order, radius = Interval.get_perturbation(interval)[:2]
    found = torch.maximum(low.abs(), high.abs())
    return found if order == math.inf else found + radius


def merged(rows: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[int, Tensor, Tensor | None]:
    """Return sizes of a linear layer's weights after a specification is merged in, and how many roundings that took.

    Args:
        rows: (B, S, K), or None.
        weight: (K, n), sizes.
        bias: (K,), sizes, or None.
    """
    if rows is None:
        return 0, weight, bias
    rows = rows.abs()
    # A product with 0 is exact, so only the others count.
    terms = int((rows != 0).sum(-1).max()) if rows.numel() else 0
    return terms, rows.matmul(weight), None if bias is None else rows.matmul(bias)


def _linear(node: Any, sizes: Sequence[Tensor], rows: Tensor | None) -> Count:
    first, second, *third = (part.abs() for part in node._preprocess(*sizes) if part is not None)
    terms, weight, bias = merged(rows, second, third[0] if third else None)
    turned = weight.transpose(-2, -1)
    merged_rows = first.dim() == 2 and weight.dim() == 3
    found = torch.bmm(first.unsqueeze(1), turned).squeeze(1) if merged_rows else first.matmul(turned)
    found = found if bias is None else found + bias
    # Products of two intervals are sums of up to nine products of their parts.
    return weight.shape[-1] + terms, 16 * found if node.is_input_perturbed(1) else found


def _convolution(node: Any, sizes: Sequence[Tensor], _: Tensor | None) -> Count:
    return sizes[1].numel() // min(sizes[1].shape[:2]), node.forward(*sizes)


def _normalisation(node: Any, sizes: Sequence[Tensor], _: Tensor | None) -> Count:
    x, weight, bias, mean, variance = sizes
    if not getattr(node, "use_affine", True):
        weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
    scale = weight / torch.sqrt(variance + node.eps)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return 8, scale.view(shape) * x + (bias + mean * scale).view(shape)


def _sum(node: Any, sizes: Sequence[Tensor], _: Tensor | None) -> Count:
    """Sums, means and average pooling: their own forward, of the sizes."""
    found: Tensor = node.forward(*sizes)
    kernel = getattr(node, "kernel_size", None)
    return math.prod(kernel) if kernel is not None else sizes[0].numel(), found


def _added(_: Any, sizes: Sequence[Tensor], __: Tensor | None) -> Count:
    return 1, sizes[0] + sizes[1]


def _multiplied(_: Any, sizes: Sequence[Tensor], __: Tensor | None) -> Count:
    return 4, sizes[0] * sizes[1]


SUMS: dict[str, Callable[[Any, Sequence[Tensor], Tensor | None], Count]] = {
    "Linear": _linear,
    "MatMul": _linear,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "BatchNormalization": _normalisation,
    "AveragePool": _sum,
    "GlobalAveragePool": _sum,
    "ReduceMean": _sum,
    "ReduceSum": _sum,
    "CumSum": _sum,
    "Add": _added,
    "Sub": _added,
    "Mul": _multiplied,
}
"""Operators whose error is relative to a magnitude; the name is that of auto-LiRPA's class, without Bound."""

STRUCTURAL = frozenset(
    "Input Params Buffers Constant PrimConstant ConstantOfShape Range Shape Flatten Reshape Transpose Concat Slice Squeeze "  # noqa: SIM905
    "Unsqueeze Gather GatherElements Expand Split Pad Identity Dropout Neg Where Tile Equal Not".split()
)
"""Operators that only move values, or change their sign."""

EXACT = STRUCTURAL | frozenset({"Relu", "Abs", "MaxPool", "ReduceMax", "ReduceMin", "Max", "Min", "Sign", "Clip", "HardTanh"})
"""Operators whose intervals take values and compare them, without arithmetic."""

FUNCTIONS = dict.fromkeys(
    ("LeakyRelu", "Exp", "Log", "Sqrt", "Sqr", "Pow", "Reciprocal", "Tanh", "Sigmoid", "Atan", "Softplus", "Cast", "Div"), 0.0
) | {"Sin": float(_ULPS), "Cos": float(_ULPS)}
"""Elementary functions: ends of their intervals are off by 16 units in the last place, and so many of 1 + the argument's size.

The second is for where the argument's period is counted."""

STRANGERS = 128
"""Roundings that an operator of a plugin is given: 64 units in the last place of 1 + the sizes of its outputs and inputs."""

_SOFTPLUS_JUMP = 3e-9
"""torch's softplus is x above 20, below its value at 20: at the jump it is not monotonic."""


def kind(node: Any) -> str:
    """Return the name of the operator of auto-LiRPA that a node is, or that it extends and rounds itself; empty for others."""
    own = type(node).__mro__ if getattr(node, "rounds_itself", False) else type(node).__mro__[:1]
    known = (base.__name__ for base in own if base.__module__.partition(".")[0] == "auto_LiRPA")
    return next(known, "").removeprefix("Bound")


@contextmanager
def plain_convolutions(dtype: torch.dtype, outward: bool) -> Iterator[None]:
    """Compute float32 convolutions as sums of products, without which no bound of their rounding holds for each output.

    cuDNN and NNPACK may choose transforms (Winograd's, FFT) instead.
    """
    if not outward or dtype is not torch.float32:
        yield
        return
    cudnn = torch.backends.cudnn  # set by name: cudnn.flags(...) would also set allow_tf32, to its own default
    before = cudnn.enabled
    cudnn.enabled = False
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        cudnn.enabled = before


class Outward:
    """Rounds the intervals of a graph's nodes outward, from when it is attached.

    An operator that comes from elsewhere may say its own bound: ``interval_rounding(low, high, *intervals)`` returns what its
    ends are off by at most, elementwise. Without it an elementwise operator is given 64 units in the last place of 1 + its own
    and its inputs' size, and any other is refused: each output has to be made from the inputs at its place alone, as values
    within the intervals show. One with ``rounds_itself`` gets this object as ``outward``, and widens itself.

    Args:
        graph: auto-LiRPA's BoundedModule.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.active = True
        """Whether anything is rounded outward now; otherwise intervals are what floating point gives."""
        self.sizes: dict[str, Tensor] = {}
        """Of each node's interval in the last pass, for those who bound linear bounds."""
        self.elementwise: dict[str, bool] = {}
        """Whether an operator from elsewhere is, as far as any pass has shown."""
        for node in graph._modules.values():
            if getattr(node, "rounds_itself", False):
                node.outward = self
            node.interval_propagate = self._rounded(node, node.interval_propagate)

    def _rounded(self, node: Any, propagate: Callable[..., Any]) -> Callable[..., Any]:
        def interval_propagate(*intervals: Any, C: Tensor | None = None) -> Any:
            options = {} if C is None else {"C": C}
            if not node.perturbed:
                return propagate(*intervals, **options)
            if getattr(node, "rounds_itself", False):
                found = propagate(*intervals, **options)
            else:
                found = self.widened(node, intervals, lambda: propagate(*intervals, **options), C)
            if C is None and isinstance(found[0], Tensor):
                self.sizes[node.name] = size(found).detach()
            return found

        return interval_propagate

    def widened(self, node: Any, intervals: Sequence[Any], propagate: Callable[[], Any], rows: Tensor | None = None) -> Any:
        """Return a node's interval, widened by the error of its rounding.

        Raises:
            ParameterError: an operator that the table does not account for, or constants that it does not.
        """
        name = kind(node)
        if name in EXACT:
            self._constants_are_exact(node)
            return propagate()
        if name == "Div":
            self._constants_are_exact(node)
            low, high = _quotient(*intervals)
        else:
            low, high = propagate()
        if not self.active:
            return low, high
        with torch.no_grad():
            below, above = self._error(node, name, intervals, (low, high), rows)
        return low - below, high + above

    def _error(self, node: Any, name: str, intervals: Sequence[Any], found: Bounds, rows: Tensor | None) -> Bounds:
        if name in SUMS:
            both = self.sum_error(node, [size(interval) for interval in intervals], rows)
            return both, both
        self._constants_are_exact(node)
        if name in FUNCTIONS:
            shift = growth(1, found[0].dtype) * FUNCTIONS[name] * (1 + size(intervals[0]))
            shift = shift + (_SOFTPLUS_JUMP if name == "Softplus" else 0.0)
            below, above = (error(_ULPS, end.abs()) + shift for end in found)
            return below, above
        both = self._stranger_error(node, name, intervals, found)
        return both, both

    def _stranger_error(self, node: Any, name: str, intervals: Sequence[Any], found: Bounds) -> Tensor:
        perturbed = [interval for parent, interval in zip(node.inputs, intervals, strict=True) if parent.perturbed]
        if not name:
            known = self.elementwise.get(node.name, True)
            self.elementwise[node.name] = known and _is_elementwise(node, intervals, found[0].shape)
        if hasattr(node, "interval_rounding"):
            return declared(node, "interval_rounding", found[0], *found, *intervals)
        if name or not self.elementwise[node.name]:
            raise unknown(node, "bounds", "interval_rounding(low, high, *intervals)", "another method")
        total = 1 + size(found)
        for interval in perturbed:
            total = total + size(interval)
        return error(STRANGERS, total)

    def sum_error(self, node: Any, sizes: Sequence[Tensor], rows: Tensor | None = None, roundings: int = 0) -> Tensor:
        """Return the error of a node of :data:`SUMS`, given its inputs' sizes.

        Args:
            node: of the graph.
            sizes: of its inputs.
            rows: a specification that was merged into it.
            roundings: besides the node's own.
        """
        rule = SUMS[kind(node)]
        count, magnitude = rule(node, sizes, rows)
        found = error(count + _SPARE + roundings, magnitude)
        radii = [self.radius(parent) for parent in node.inputs]
        if any(radius is not None for radius in radii):
            # Every operator of the table but batch normalisation is linear in each of its constants.
            if kind(node) == "BatchNormalization":
                raise _inexact(node)
            wider = [a if b is None else a + b for a, b in zip(sizes, radii, strict=True)]
            larger = rule(node, wider, rows)[1]
            found = found + (larger - magnitude) + error(count + _SPARE, larger)
        return found

    def radius(self, node: Any) -> Tensor | None:
        """Return by how much a constant that is computed from the weights is off at most; None where it is exact.

        Raises:
            ParameterError: a constant whose computation the table does not account for.
        """
        if node.perturbed or _is_plain(node):
            return None
        low, high = self._enclosure(node)
        return None if low is high else 2 * (high - low)

    def _enclosure(self, node: Any) -> Bounds:
        found = value_of(node)
        if _is_plain(node):
            return found, found
        parts = [self._enclosure(parent) for parent in node.inputs]
        name, exact = kind(node), all(low is high for low, high in parts)
        if exact and (name in EXACT or (name == "Cast" and bool((found.to(parts[0][0].dtype) == parts[0][0]).all()))):
            return found, found
        if name not in _CORNERS:
            raise _inexact(node)
        corners = [node.forward(*values) for values in _combinations(parts)]
        low, high = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
        sizes = [size(part) if isinstance(part[0], Tensor) else part[0] for part in parts]
        count, magnitude = SUMS[name](node, sizes, None) if name in SUMS else (_ULPS, size((low, high)))
        off = error(count + _SPARE, magnitude)
        return low - off, high + off

    def _constants_are_exact(self, node: Any) -> None:
        for parent in node.inputs:
            if self.radius(parent) is not None:
                raise _inexact(node)

    def specified(self, found: tuple[Tensor | None, Tensor | None], rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Widen interval bounds whose specification auto-LiRPA multiplied to the last node's interval, unmerged."""
        final = self.graph.final_node()
        if rows is None or not hasattr(final, "interval") or not self.active:
            return found
        with torch.no_grad():
            terms, magnitude, _ = merged(rows, size(final.interval).unsqueeze(-1), None)
            off = error(terms + _SPARE, magnitude.squeeze(-1))
        low, high = found
        return None if low is None else low - off, None if high is None else high + off


_CORNERS = frozenset({"Add", "Sub", "Mul", "ReduceMean", "ReduceSum", "Exp", "Sqrt", "Tanh", "Sigmoid"}) | STRUCTURAL
"""Operators whose extreme values over a box lie at corners of it."""


def _combinations(parts: Sequence[Bounds]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[]]
    for low, high in parts:
        found = [[*values, end] for values in found for end in ((low,) if low is high else (low, high))]
    return found if len(found) <= 4 else [[low for low, _ in parts], [high for _, high in parts]]


def _is_plain(node: Any) -> bool:
    """Whether a constant is there as it is: a weight, a number, or what counts and points rather than measures."""
    if not node.inputs:
        return True
    found = value_of(node)
    return not isinstance(found, Tensor) or not found.is_floating_point()


def value_of(node: Any) -> Any:
    """Return the value of a constant node."""
    for known in (getattr(node, "forward_value", None), getattr(node, "interval", (None,))[0]):
        if known is not None:
            return known
    found = node.forward(*(value_of(parent) for parent in node.inputs))
    return torch.tensor(found) if isinstance(found, torch.Size) else found


def _quotient(numerator: Any, denominator: Any) -> Bounds:
    """Return the interval of a quotient. auto-LiRPA's own takes the numerator for positive.

    Raises:
        NotImplementedError: the denominator may be 0.
    """
    if bool(((denominator[0] <= 0) & (denominator[1] >= 0)).any()):
        raise NotImplementedError("division by an interval that contains 0")
    corners = torch.stack([a / b for a in numerator for b in denominator])
    return corners.amin(0), corners.amax(0)


def _is_elementwise(node: Any, intervals: Sequence[Any], shape: torch.Size) -> bool:
    """Whether outputs come from the inputs at their own places alone, as far as values within the intervals show."""
    places = [place for place, parent in enumerate(node.inputs) if parent.perturbed]
    try:
        if np.broadcast_shapes(*(intervals[place][0].shape for place in places)) != shape:
            return False
    except ValueError:
        return False
    for place in places:
        values = [low for low, _ in intervals]
        low, high = (end.contiguous() for end in intervals[place])
        chosen = (torch.rand(low.shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(low.device)
        at_low, at_high, at_both = (
            node.forward(*values[:place], value, *values[place + 1 :]) for value in (low, high, torch.where(chosen, low, high))
        )
        expected = torch.where(chosen, at_low, at_high)
        if bool(((at_both - expected).abs() > error(STRANGERS, 1 + expected.abs())).any()):
            return False
    return True


def declared(node: Any, name: str, like: Tensor, *arguments: Any) -> Tensor:
    """Return what an operator says of its own rounding, in the shape of what is rounded.

    Raises:
        ParameterError: it is no error bound of that shape.
    """
    found = getattr(node, name)(*arguments)
    try:
        found = found.to(like).expand_as(like)
        good = bool((found >= 0).all())
    except (AttributeError, RuntimeError):
        good = False
    if not good:
        raise ParameterError(
            f"{name} of operator {type(node).__name__} returns no bound of its rounding error. Nothing was certified.",
            cause=f"it has to return numbers from 0 up, a tensor that expands to the shape of the outputs, {tuple(like.shape)}.",
            fix="Correct the operator.",
        )
    result: Tensor = found
    return result


def unknown(node: Any, bounds: str, method: str, other: str) -> NotBoundedError:
    """Return the refusal of an operator whose rounding is not known.

    Args:
        node: of the graph.
        bounds: which of its bounds.
        method: by which an operator from elsewhere can say it, with its arguments.
        other: what to use instead.
    """
    own = kind(node)
    return NotBoundedError(
        f"The rounding of the {bounds} of operator {type(node).__name__} is not known. Nothing was certified.",
        cause="claims are made of bounds that are rounded outward, and "
        + (
            "its arithmetic is in no table."
            if own
            else "an operator of a plugin that does not make each output from the input at its place alone has to say its own."
        ),
        fix=f"Use {other}." if own else f"Give it a method {method} that bounds its rounding error, or use {other}.",
    )


def _inexact(node: Any) -> NotBoundedError:
    return NotBoundedError(
        f"The rounding of the constants of operator {node.name} ({type(node).__name__}) is not known. Nothing was certified.",
        cause="forward() computes them from other weights, by operators whose rounding is not bounded.",
        fix="Compute them once and keep them as a parameter or buffer, such as by "
        "torch.nn.utils.parametrize.remove_parametrizations.",
    )
