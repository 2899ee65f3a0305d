"""What a moment rule says about an operator, apart from how covariances are represented.

A rule turns one of auto-LiRPA's nodes into one of these; every representation knows what to do with each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from rsplugins.moments.activations import Activation

Map: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """y = A x + offset.

    Attributes:
        apply: x (N, *in) -> A x (N, *out), without the offset; every row by itself.
        squared: v (N, *in) -> (A * A) v: the variances of y when the components of x are independent with variances v.
        offset: broadcastable to (1, *out).
        mixing: S (B, C, C) -> (B, C', C'): covariance over the channels at one position of y when the positions of x are
            independent with covariance S each; None when the operator has no such form.
        aligned: C (B, C, M) -> (B, C', M): what an output position takes from the input position it lies on, applied to rows.
        taps: input positions that an output position sums over.
        rows: V (..., n_out) -> V A (..., n_in), for maps between vectors; None where nobody needs it.
        pointwise: whether every component of y depends on one component of x, so that independence is kept.
    """

    apply: Map
    squared: Map
    offset: Tensor | float = 0.0
    mixing: Map | None = None
    aligned: Map | None = None
    taps: int = 1
    rows: Map | None = None
    pointwise: bool = False


@dataclass(frozen=True)
class Elementwise:
    """y = f(x), elementwise."""

    activation: Activation


@dataclass(frozen=True)
class Maximum:
    """y_i = the largest of x at several places; folded two at a time by Clark's formulas.

    Attributes:
        views: each (n_out,), indices into the flattened x; -1 where the window sticks out of the image. In the first view no
            index may be -1 unless a later one covers the place.
        shape: of y, without the batch.
    """

    views: Sequence[Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Combination:
    """y = sum of coefficient * input over several inputs of one shape.

    Attributes:
        coefficients: one for each input.
    """

    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Concatenation:
    """y = the inputs one after the other along a dimension.

    Attributes:
        dim: counted with the batch, so at least 1.
    """

    dim: int


Operation: TypeAlias = Linear | Elementwise | Maximum | Combination | Concatenation


class Representation(Protocol):
    """How means and covariances of the nodes that are still needed are kept. One object goes through one batch.

    Nodes are called by their names in auto-LiRPA's graph. ``keep`` names the nodes, the new one apart, that later operations will
    still read: with each of them the new one's cross-covariance is wanted.
    """

    def start(self, name: str, mean: Tensor, sigma: float) -> None:
        """Begin with N(mean, sigma^2 I), mean (B, *shape)."""

    def step(self, name: str, operation: Operation, sources: Sequence[str], keep: Sequence[str]) -> None:
        """Add the node that an operation makes of the sources, and forget all but it and ``keep``."""

    def output(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean (B, K) and the covariance (B, K, K) of a node."""
