"""The representation ``low-rank``: a factor plus a diagonal on the way, and the logits' covariance by the adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, singledispatchmethod

import torch
from torch import Tensor

from rsplugins.double import bring
from rsplugins.moments.gaussian import larger
from rsplugins.moments.operations import Combination, Concatenation, Elementwise, Linear, Maximum, Operation

RANK = 64


@dataclass(frozen=True)
class _Node:
    """One node's state.

    Attributes:
        mean: (B, *shape).
        factor: (B or 1, rank, *shape): the columns of L, each in the node's shape; Cov = L L^T + diag.
        diagonal: (B or 1, *shape), variances that the factor does not hold.
        tangent: (B, *shape), zeros that remember how they depend on every noise that entered.
        white: whether the components are independent, with variances ``diagonal`` (the factor is then not counted).
    """

    mean: Tensor
    factor: Tensor
    diagonal: Tensor
    tangent: Tensor
    white: bool = False

    @property
    def variance(self) -> Tensor:
        return self.diagonal if self.white else self.factor.square().sum(1) + self.diagonal


class LowRank:
    r"""Variances from a factor of few columns plus a diagonal; the logits' covariance exact to first order.

    With S the covariance before an activation, D its mean slopes and c the part of its exact variances that D S D lacks, the
    first-order rule is :math:`S \to D S D + \mathrm{diag}(c)`. Unrolled over the network, the covariance of the logits is

    .. math:: \sigma^2 J_0 J_0^T + \sum_l J_l \,\mathrm{diag}(c_l)\, J_l^T

    with J_l the Jacobian of the logits with respect to the output of activation l in the network whose activations are replaced
    by their mean slopes. K backward passes give all J_l, residual connections with their cross-covariance included, and no n x n
    matrix is ever needed, but for the n variances before each activation. Those come from the factor: ``rank`` fixed orthonormal
    directions of the input noise pushed through the slopes, scaled so that the variances after the first layer are exact, plus
    the diagonal c pushed through the squared weights.

    The error: the variances before later activations have a relative standard error of about sqrt(2 / rank), .18 at rank 64, and
    none when ``rank`` is at least the number of inputs; covariances among the parts c are neglected there, and only there. They
    enter through D and c alone, where the errors of many neurons average out: see the table in docs/covariance.md.

    Args:
        rank: columns of the factor.
        seed: of the directions. The same for every input, so the estimate is a smooth function of the input.
    """

    def __init__(self, rank: int = RANK, seed: int = 0) -> None:
        self.rank, self.seed = rank, seed
        self._nodes: dict[str, _Node] = {}
        self._noises: list[tuple[Tensor, Tensor]] = []
        self._grad = False

    def start(self, name: str, mean: Tensor, sigma: float) -> None:
        """Begin with N(mean, sigma^2 I)."""
        self._grad = torch.is_grad_enabled()
        shape, size = mean.shape[1:], mean[0].numel()
        rows = bring(directions(min(self.rank, size), size, self.seed), mean.device, mean.dtype)
        factor = math.sqrt(size / min(self.rank, size)) * sigma * rows
        diagonal = torch.full((1, *shape), sigma**2, dtype=mean.dtype, device=mean.device)
        node = _Node(mean, factor.view(1, -1, *shape), diagonal, torch.zeros_like(mean), white=True)
        self._nodes[name] = replace(node, tangent=self._noise(diagonal.expand_as(mean)))

    def _noise(self, variance: Tensor) -> Tensor:
        """Return zeros that stand for independent noise of these variances entering here."""
        with torch.enable_grad():
            entry = torch.zeros_like(variance, memory_format=torch.contiguous_format).requires_grad_()
        self._noises.append((entry, variance))
        return entry

    def step(self, name: str, operation: Operation, sources: Sequence[str], keep: Sequence[str]) -> None:
        """Add a node and forget what is no longer needed."""
        found = self._add(operation, [self._nodes[node] for node in sources])
        self._nodes = {node: value for node, value in self._nodes.items() if node in keep} | {name: found}

    def output(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean, and the covariance by K backward passes."""
        node = self._nodes[name]
        batch, width = node.mean.shape
        entries = [entry for entry, _ in self._noises]
        columns: list[list[Tensor]] = []
        for k in range(width):
            with torch.enable_grad():
                total = node.tangent[:, k].sum()
            found = torch.autograd.grad(total, entries, retain_graph=True, create_graph=self._grad, allow_unused=True)
            columns.append([g if g is not None else torch.zeros_like(e) for g, e in zip(found, entries, strict=True)])
        covariance = torch.zeros(batch, width, width, dtype=node.mean.dtype, device=node.mean.device)
        for position, (_, variance) in enumerate(self._noises):
            jacobian = torch.stack([column[position].flatten(1) for column in columns], 1)
            scaled = jacobian * variance.flatten(1).unsqueeze(1)
            covariance = covariance + scaled @ jacobian.transpose(-1, -2)
        return node.mean, 0.5 * (covariance + covariance.transpose(-1, -2))

    @singledispatchmethod
    def _add(self, operation: Operation, nodes: Sequence[_Node]) -> _Node:
        raise TypeError(f"{type(operation).__name__} is not an operation")

    @_add.register
    def _(self, operation: Linear, nodes: Sequence[_Node]) -> _Node:
        (node,) = nodes
        factor = _columns(operation.apply, node.factor)
        diagonal = operation.squared(node.diagonal)
        if node.white and not operation.pointwise:
            # The columns are a sample of the noise; its variances are known exactly.
            share = factor.square().sum(1).clamp_min(torch.finfo(factor.dtype).tiny)
            factor = factor * (diagonal / share).sqrt().unsqueeze(1)
            diagonal = torch.zeros_like(diagonal)
        with torch.enable_grad():
            tangent = operation.apply(node.tangent)
        mean = operation.apply(node.mean) + operation.offset
        return _Node(mean, factor, diagonal, tangent, white=node.white and operation.pointwise)

    @_add.register
    def _(self, operation: Elementwise, nodes: Sequence[_Node]) -> _Node:
        (node,) = nodes
        variance = node.variance.expand_as(node.mean)
        own = operation.activation.moments(node.mean, variance)
        lacking = own.variance - own.slope.square() * variance
        with torch.enable_grad():
            tangent = own.slope * node.tangent + self._noise(lacking)
        factor = own.slope.unsqueeze(1) * node.factor
        return _Node(own.mean, factor, own.slope.square() * node.diagonal + lacking, tangent, white=node.white)

    @_add.register
    def _(self, operation: Maximum, nodes: Sequence[_Node]) -> _Node:
        (node,) = nodes
        views = [_view(node, view.clamp_min(0)) for view in operation.views]
        present, best = operation.views[0] >= 0, views[0]
        for places, other in zip(operation.views[1:], views[1:], strict=True):
            both, new = present & (places >= 0), places >= 0
            between = torch.zeros_like(best.mean) if node.white else (best.factor * other.factor).sum(1)
            found = larger(best.mean, best.variance, other.mean, other.variance, between)
            one = torch.where(both, found.first, (~new).to(best.mean))
            two = 1 - one
            diagonal = one.square() * best.diagonal + two.square() * other.diagonal
            factor = one.unsqueeze(1) * best.factor + two.unsqueeze(1) * other.factor
            linear = diagonal if node.white else factor.square().sum(1) + diagonal
            lacking = torch.where(both, (found.variance - linear).clamp_min(0), torch.zeros_like(linear))
            mean = torch.where(both, found.mean, one * best.mean + two * other.mean)
            with torch.enable_grad():
                tangent = one * best.tangent + two * other.tangent + self._noise(lacking)
            best = _Node(mean, factor, diagonal + lacking, tangent, node.white)
            present = present | new
        shape = operation.shape
        with torch.enable_grad():
            tangent = best.tangent.view(-1, *shape)
        factor = best.factor.reshape(*best.factor.shape[:2], *shape)
        return _Node(best.mean.view(-1, *shape), factor, best.diagonal.view(-1, *shape), tangent, node.white)

    @_add.register
    def _(self, operation: Combination, nodes: Sequence[_Node]) -> _Node:
        terms = list(zip(operation.coefficients, map(_coloured, nodes), strict=True))
        zero = torch.zeros(()).to(nodes[0].mean)
        with torch.enable_grad():
            tangent = sum((c * node.tangent for c, node in terms), zero)
        return _Node(
            sum((c * node.mean for c, node in terms), zero),
            sum((c * node.factor for c, node in terms), zero),
            sum((c * c * node.diagonal for c, node in terms), zero),
            tangent,
        )

    @_add.register
    def _(self, operation: Concatenation, nodes: Sequence[_Node]) -> _Node:
        nodes, dim = [_coloured(node) for node in nodes], operation.dim
        batch = len(nodes[0].mean)
        with torch.enable_grad():
            tangent = torch.cat([node.tangent for node in nodes], dim)
        return _Node(
            torch.cat([node.mean for node in nodes], dim),
            torch.cat([node.factor.expand(batch, *node.factor.shape[1:]) for node in nodes], dim + 1),
            torch.cat([node.diagonal.expand(batch, *node.diagonal.shape[1:]) for node in nodes], dim),
            tangent,
        )


@lru_cache(maxsize=4)
def directions(count: int, size: int, seed: int) -> Tensor:
    """Return orthonormal rows (count, size) in random directions, the same on every machine up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(size, count, dtype=torch.float64, generator=generator)
    rows: Tensor = torch.linalg.qr(columns).Q.t().contiguous()
    return rows


def _columns(apply: object, factor: Tensor) -> Tensor:
    assert callable(apply)
    found: Tensor = apply(factor.flatten(0, 1))
    return found.view(*factor.shape[:2], *found.shape[1:])


def _coloured(node: _Node) -> _Node:
    """Return the node with its variances in the factor, as another node may be correlated with it."""
    if not node.white:
        return node
    share = node.factor.square().sum(1).clamp_min(torch.finfo(node.factor.dtype).tiny)
    factor = node.factor * (node.diagonal / share).sqrt().unsqueeze(1)
    return replace(node, factor=factor, diagonal=torch.zeros_like(node.diagonal), white=False)


def _view(node: _Node, places: Tensor) -> _Node:
    with torch.enable_grad():
        tangent = node.tangent.flatten(1)[:, places]
    mean = node.mean.flatten(1)[:, places]
    factor = node.factor.flatten(2)[..., places]
    return _Node(mean, factor, node.diagonal.flatten(1)[:, places], tangent, node.white)
