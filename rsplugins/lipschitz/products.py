r"""Products of two values of the image, such as the gates of squeeze-and-excitation: a bound on a set of images.

For h = f g, entry by entry with broadcasting, :math:`h(x) - h(y) = g(x) (f(x) - f(y)) + f(y) (g(x) - g(y))`. An entry g_j meets
some entries of f; with :math:`s_j(f)` the norm of those, :math:`\|f(y) (g(x) - g(y))\| \le \max_j s_j(f(y)) \|g(x) - g(y)\|`,
and likewise for the other term. So :math:`L_h \le S_g L_f + S_f L_g`, with S the largest s on the set.

The set: all images within :math:`\sqrt d` of an image of d pixels in [0, 1], which is a part of the ball of radius
:math:`\rho = 1.5 \sqrt d` around grey. Let :math:`D_v` bound how far a value v lies from its value at grey there:
:math:`\rho` for the image; through a layer it grows as a Lipschitz constant does, and behind a normalisation it is no more than
the diameter of what that can give. With :math:`f_0` the value at grey, and the values of g within :math:`[-b_g, b_g]` as those of
a sigmoid are, :math:`h - h_0 = g (f - f_0) + f_0 (g - g_0)` gives
:math:`D_h \le S_g D_f + \min(s(f_0) D_g, 2 b_g \|f_0\|)`. Then, r being the largest factor by which broadcasting stretches f and
m the number of entries met, :math:`S_f \le \min(s(f_0) + r D_f, b_f \sqrt m)`.

The values at grey are computed in float64 and taken for those of exact arithmetic but for :data:`SLACK`, as the logits of a
margin are: a network that cancels fifteen digits on purpose is not bounded in exact arithmetic (``float-idealised``).

A radius above :math:`\sqrt d` must not be claimed with such a bound: :attr:`rsplugins.lipschitz.analysis.Analysis.reach` says so.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rsplugins.lipschitz.norms import times, up

PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_")
SLACK = 1e-6
"""Relative error that float64 may have made in a value at the grey image: a thousand million units in the last place."""


@dataclass(frozen=True)
class Factor:
    """What is known of one factor, f, of a product.

    Attributes:
        grey: the largest norm of entries of f that meet one entry of the other factor, at the grey image.
        total: the norm of f, broadcast, at the grey image.
        stretch: by how much broadcasting may stretch f.
        most: entries of f that meet one of the other.
        within: bound of the values of f on all images, or infinity.
    """

    grey: float
    total: float
    stretch: float
    most: int
    within: float = math.inf

    def largest(self, deviation: float) -> float:
        """Return S: the largest norm that meets an entry of the other factor, where f is so far from its value at grey."""
        always = up(times(self.within, math.sqrt(self.most) * (1.0 + 1e-15)))
        return min(up(up(self.grey * (1.0 + SLACK)) + times(self.stretch, deviation)), always)


@dataclass(frozen=True)
class Product:
    """A product of two values: what is known of both factors, and the reach of its bound."""

    first: Factor
    second: Factor
    reach: float

    @property
    def radius(self) -> float:
        """The radius of the ball around grey."""
        return up(1.5 * self.reach)

    def constant(self, first: float, second: float, deviations: tuple[float, float]) -> float:
        """Return a bound of the product's constant, from those of its factors and how far they get from grey."""
        left = times(self.second.largest(deviations[1]), first)
        return up(left + times(self.first.largest(deviations[0]), second))

    def deviation(self, first: float, second: float) -> float:
        """Return a bound of how far the product gets from its value at grey, from those of its factors."""
        return min(
            self._deviation(self.first, self.second, first, second), self._deviation(self.second, self.first, second, first)
        )

    @staticmethod
    def _deviation(moved: Factor, other: Factor, first: float, second: float) -> float:
        still = min(times(up(moved.grey * (1.0 + SLACK)), second), times(2.0 * other.within, up(moved.total * (1.0 + SLACK))))
        return up(times(other.largest(second), first) + still)


def factors(first: Tensor, second: Tensor) -> tuple[Factor, Factor]:
    """Return what the values of two factors at the grey image, with a batch of one, say of them."""
    shape = torch.broadcast_tensors(first, second)[0].shape  # type: ignore[no-untyped-call]
    return _factor(first, second, shape), _factor(second, first, shape)


def _factor(value: Tensor, other: Tensor, shape: torch.Size) -> Factor:
    full = value.detach().double().expand(shape).square()
    sizes = (1,) * (len(shape) - other.dim()) + tuple(other.shape)
    shared = [i for i, (own, whole) in enumerate(zip(sizes, shape, strict=True)) if own != whole]
    met = full.sum(shared, keepdim=True) if shared else full
    stretched = math.prod(shape) // max(1, value.numel())
    grey, total = (up(math.sqrt(float(value)) * (1.0 + 1e-12)) for value in (met.max(), full.sum()))
    return Factor(grey, total, up(math.sqrt(stretched)), math.prod(shape[i] for i in shared))


class Recorder(fx.Interpreter):
    """Runs a graph on the grey image in float64 and notes the factors of each product of two values that depend on the image."""

    def __init__(self, root: nn.Module, graph: fx.Graph, wanted: set[fx.Node]) -> None:
        super().__init__(root, graph=graph)
        self.wanted = wanted
        self.found: dict[fx.Node, tuple[Factor, Factor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and look at the factors of a product before it may write into one."""
        if n in self.wanted:
            first, second = (self.env[node] if isinstance(node, fx.Node) else None for node in _operands(n))
            if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dtype == second.dtype == torch.float64:
                self.found[n] = factors(first, second)
        return super().run_node(n)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    both = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    return (both[0], both[1]) if len(both) == 2 else (None, None)


def is_product(node: fx.Node) -> bool:
    """Return whether a node multiplies two tensors."""
    return node.op in ("call_function", "call_method") and node.target in PRODUCTS
