r"""Linear bounds that hold whatever the rounding: their constant is lowered or raised by a bound of what rounding did to them.

CROWN walks back from a row of outputs with :math:`A z_k + b` as its bound in the values :math:`z_k` of a layer. A step computes
:math:`A W` with an error of at most :math:`\gamma_n |A||W|`, which changes the bound by at most
:math:`\gamma_n |A| (|W| |z_{k-1}|)`, and :math:`|z|` is known: intervals bound it. So each node adds its own share, with the
magnitude that :mod:`rsplugins.lirpa.outward` has for the same node, and the input adds that of the last product. The walk's own
additions, at most one for each node of the graph in a chain of them, are counted with every share.

An operator that comes from elsewhere may say its own: ``linear_rounding(size, *sizes)``, called after ``bound_backward``, gets
the sizes of its outputs and inputs over the region and returns :math:`v`, of the shape of its outputs, such that the bound of
:math:`A y` by its rows and constant is off by at most :math:`|A| v`. Without it, an elementwise operator is given 64 units in
the last place of 1 + the sizes of its outputs, of its inputs and of its inputs times their slopes. Any other is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsplugins.arithmetic import rounding_error as error
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.errors import ParameterError
from rsplugins.lirpa.bridge import roots
from rsplugins.lirpa.outward import (
    EXACT,
    FUNCTIONS,
    STRANGERS,
    STRUCTURAL,
    SUMS,
    Outward,
    declared,
    kind,
    size,
    unknown,
    value_of,
)

bridge_auto_lirpa()
from auto_LiRPA.patches import Patches  # noqa: E402
from auto_LiRPA.utils import OneHotC, eyeC  # noqa: E402

_FEW = 64
"""Roundings of a relaxation's slope and intercept, at most."""


_RESHAPED = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Neg"})


class OutwardLinear:
    """Rounds the linear bounds of a graph outward, from when it is attached.

    Args:
        outward: of the same graph: it has the sizes of all nodes' values.
    """

    def __init__(self, outward: Outward) -> None:
        self._outward, self._graph = outward, outward.graph
        self._totals: list[list[Tensor | float]] = []
        self._sizes: dict[str, Tensor] = {}
        self._additions = len(self._graph._modules)
        for node in self._graph._modules.values():
            node.bound_backward = self._shared(node, node.bound_backward)
        self._graph.backward_general = self._rounded(self._graph.backward_general)

    def _rounded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward_general(*arguments: Any, **options: Any) -> Any:
            self._totals.append([0.0, 0.0])
            self._sizes.clear()
            try:
                low, high, *rest = original(*arguments, **options)
                if self._outward.active:
                    self._last_products()
            finally:
                totals = self._totals.pop()
            below, above = (total.detach() if isinstance(total, Tensor) else total for total in totals)
            low = low if low is None or isinstance(below, float) else low - below.view_as(low)
            high = high if high is None or isinstance(above, float) else high + above.view_as(high)
            return low, high, *rest

        return backward_general

    def _shared(self, node: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def bound_backward(*arguments: Any, **options: Any) -> Any:
            found = original(*arguments, **options)
            if self._totals and node.perturbed and self._outward.active:
                with torch.no_grad():
                    for side, rows in enumerate(arguments[:2]):
                        if rows is not None:
                            self._totals[-1][side] += self._share(node, rows, [pair[side] for pair in found[0]])
            return found

        return bound_backward

    def _last_products(self) -> None:
        with torch.no_grad():
            for root in roots(self._graph):
                for side, rows in enumerate((getattr(root, "lA", None), getattr(root, "uA", None))):
                    if root.perturbed and rows is not None:
                        reach = size(root.interval)
                        self._totals[-1][side] += weighed(root, rows, error(self._count(reach), reach))

    def _share(self, node: Any, rows: Any, before: Sequence[Any]) -> Tensor:
        """Return what a node's step adds, (B, S): ``rows`` arrive at it, ``before`` leave for its inputs."""
        name = kind(node)
        if not name or hasattr(node, "linear_rounding"):
            return self._strangers_share(node, rows, before)
        if name in SUMS or name == "Div":
            return weighed(node, rows, self._sum_vector(node, name))
        if name == "Relu":
            low, high = node.inputs[0].lower, node.inputs[0].upper
            reach, constant = self._size(node.inputs[0]), torch.minimum(-low, high).clamp(min=0)
            vector = error(_FEW + self._additions, reach) + error(self._count(reach), constant)
            return weighed(node, rows, vector)
        reach = self._size(node)
        if name in STRUCTURAL:
            return weighed(node, rows, error(self._additions, reach))
        if name in FUNCTIONS or name in EXACT:
            # A relaxation k z + b touches its function in the interval: b is no larger than the function there and k z.
            found = weighed(node, rows, error(self._count(reach), 1 + 2 * reach))
            for parent, leaving in zip(node.inputs, before, strict=False):
                if leaving is not None and parent.perturbed:
                    entering = self._size(parent)
                    found = found + weighed(parent, leaving, error(self._count(entering), 4 * entering))
            return found
        raise _unknown(node)

    def _strangers_share(self, node: Any, rows: Any, before: Sequence[Any]) -> Tensor:
        reach, sizes = self._size(node), [self._size(parent) for parent in node.inputs]
        varying = [(parent, part) for parent, part in zip(node.inputs, sizes, strict=True) if parent.perturbed]
        if hasattr(node, "linear_rounding"):
            count = self._additions
            own = declared(node, "linear_rounding", reach, reach, *sizes) + error(count, reach)
        elif self._outward.elementwise.get(node.name, False) and all(part.shape == reach.shape for _, part in varying):
            # As for a relaxation of auto-LiRPA's. A line that meets its function nowhere has a larger b, but by no more than it
            # is loose, of which rounding is a small part.
            count = STRANGERS + self._count(reach)
            own = error(count, 1 + 2 * reach + sum(part for _, part in varying))
        else:
            raise _unknown(node)
        found = weighed(node, rows, own)
        for parent, leaving in zip(node.inputs, before, strict=False):
            if leaving is not None and parent.perturbed:
                found = found + weighed(parent, leaving, error(count, 4 * self._size(parent)))
        return found

    def _sum_vector(self, node: Any, name: str) -> Tensor:
        sizes = [self._size(parent) for parent in node.inputs]
        several = sum(bool(parent.perturbed) for parent in node.inputs) > 1
        if name == "Div":
            if node.inputs[1].perturbed:
                raise _unknown(node)
            return error(_FEW + self._additions, sizes[0] / sizes[1])
        if name in ("Mul", "MatMul") and several:
            return error(self._count(sizes[0]) + sizes[0].shape[-1], 4 * SUMS[name](node, sizes, None)[1])
        pairs = list(zip(node.inputs, sizes, strict=True))
        shift = SUMS[name](node, [torch.zeros_like(part) if parent.perturbed else part for parent, part in pairs], None)[1]
        own = self._outward.sum_error(node, sizes, None, self._additions)
        broadcast = any(parent.perturbed and part.shape != shift.shape for parent, part in pairs)
        if name in ("Add", "Sub", "Mul") and broadcast:
            shift = SUMS[name](node, sizes, None)[1]  # its rows are summed over the dimensions that it was expanded along
        return own + error(self._count(shift), shift)

    def _count(self, part: Tensor) -> int:
        return part[0].numel() + _FEW + self._additions

    def _size(self, node: Any) -> Tensor:
        if node.name not in self._sizes:
            self._sizes[node.name] = self._found_size(node)
        return self._sizes[node.name]

    def _found_size(self, node: Any) -> Tensor:
        if not node.perturbed:
            return size((value_of(node),) * 2)
        if not node.inputs:
            return size(node.interval)
        low, high = getattr(node, "lower", None), getattr(node, "upper", None)
        if isinstance(low, Tensor) and isinstance(high, Tensor):
            return size((low, high))
        name, known = kind(node), self._outward.sizes.get(node.name)
        if name in SUMS:
            found = SUMS[name](node, [self._size(parent) for parent in node.inputs], None)[1]
        elif name == "Relu":
            found = self._size(node.inputs[0])
        elif name in _RESHAPED:
            found = self._size(node.inputs[0])
            found = found.reshape(len(found), *node.output_shape[1:])
        elif known is not None:
            return known
        else:
            raise _unknown(node)
        return found if known is None or known.shape != found.shape else torch.minimum(found, known)


def weighed(node: Any, rows: Any, vector: Tensor) -> Tensor:
    """Return :math:`|A| v`, (B, S), for rows A as auto-LiRPA has them and a vector of the shape of a node's output, (B, ...)."""
    if isinstance(rows, eyeC):
        return vector.flatten(1)
    if isinstance(rows, OneHotC):
        flat, index = vector.flatten(1), rows.index
        found: Tensor = flat[:, index] if index.dim() == 1 else flat.gather(1, index.t())
        return found if rows.coeffs is None else found * rows.coeffs.abs().t()
    if not isinstance(rows, Patches):
        return torch.einsum("sb...,b...->bs", rows.abs(), vector.to(rows.dtype))
    if rows.identity == 1:
        where = rows.unstable_idx
        return vector.flatten(1) if where is None else vector[:, where[0], where[1], where[2]]
    absolute = rows.create_similar(rows.patches.abs())
    found = node.get_bias(absolute, vector)
    return found.transpose(0, 1).flatten(1)


def _unknown(node: Any) -> ParameterError:
    return unknown(node, "linear bounds", "linear_rounding(size, *sizes)", "ibp")
