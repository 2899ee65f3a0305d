"""The representation ``full``: every covariance and cross-covariance in full; for small networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Literal

import torch
from torch import Tensor

from rsplugins.moments.gaussian import larger, with_diagonal
from rsplugins.moments.operations import Combination, Concatenation, Elementwise, Linear, Maximum, Operation

Cross = Literal["exact", "first-order"]


class Full:
    """The joint Gaussian of all nodes that are still needed.

    Linear operators are exact. Activations have exact means, variances and (jointly Gaussian inputs taken for granted)
    cross-covariances with other nodes; between the components of one activation, see ``cross``. What is left is the closure:
    after an activation the vector is treated as Gaussian again.

    Args:
        cross: ``"exact"`` takes the exact covariance between components of an activation; ``"first-order"`` D S D off the
            diagonal.
    """

    def __init__(self, cross: Cross = "exact") -> None:
        self.cross = cross
        self.mean: dict[str, Tensor] = {}
        self._covariance: dict[tuple[str, str], Tensor] = {}

    def covariance(self, a: str, b: str) -> Tensor:
        """Return Cov(a, b), (B or 1, n_a, n_b); the batch is 1 as long as it does not depend on the input."""
        if (a, b) in self._covariance:
            return self._covariance[a, b]
        return self._covariance[b, a].transpose(-1, -2)

    def start(self, name: str, mean: Tensor, sigma: float) -> None:
        """Begin with N(mean, sigma^2 I)."""
        self.mean[name] = mean
        size = mean[0].numel()
        self._covariance[name, name] = sigma**2 * torch.eye(size, dtype=mean.dtype, device=mean.device).unsqueeze(0)

    def step(self, name: str, operation: Operation, sources: Sequence[str], keep: Sequence[str]) -> None:
        """Add a node and forget what is no longer needed."""
        self._add(operation, name, sources, keep)
        alive = {name, *keep}
        self.mean = {node: value for node, value in self.mean.items() if node in alive}
        self._covariance = {pair: value for pair, value in self._covariance.items() if alive.issuperset(pair)}

    def output(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and covariance."""
        mean, covariance = self.mean[name], self.covariance(name, name)
        return mean, covariance.expand(len(mean), -1, -1)

    @singledispatchmethod
    def _add(self, operation: Operation, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        raise TypeError(f"{type(operation).__name__} is not an operation")

    @_add.register
    def _(self, operation: Linear, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        shape = self.mean[source].shape[1:]

        def left(matrix: Tensor) -> Tensor:
            rows = matrix.transpose(-1, -2)
            found = operation.apply(rows.reshape(-1, *shape))
            return found.reshape(*rows.shape[:2], -1).transpose(-1, -2)

        self.mean[name] = operation.apply(self.mean[source]) + operation.offset
        half = left(self.covariance(source, source))
        self._set_own(name, left(half.transpose(-1, -2)))
        for other in keep:
            self._covariance[name, other] = half if other == source else left(self.covariance(source, other))

    @_add.register
    def _(self, operation: Elementwise, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        mean = self.mean[source].flatten(1)
        before = self.covariance(source, source)
        own, after = operation.activation.first_order(mean, before)
        if self.cross == "exact":
            after = operation.activation.covariance(mean, before)
        self.mean[name] = own.mean.view_as(self.mean[source])
        self._set_own(name, after)
        for other in keep:
            self._covariance[name, other] = own.slope.unsqueeze(-1) * self.covariance(source, other)

    @_add.register
    def _(self, operation: Maximum, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        values, table = self.mean[source].flatten(1), self.covariance(source, source).expand(len(self.mean[source]), -1, -1)
        spread = table.diagonal(dim1=-2, dim2=-1)
        first = operation.views[0].clamp_min(0)
        absent = operation.views[0] < 0
        mean, own, cross = values[:, first], table[:, first][:, :, first], table[:, first]
        others = {other: self.covariance(source, other)[:, first] for other in keep}
        for view in operation.views[1:]:
            at = view.clamp_min(0)
            variance = own.diagonal(dim1=-2, dim2=-1)
            between = cross.gather(2, at.expand(len(mean), -1).unsqueeze(-1))[..., 0]
            best = larger(mean, variance, values[:, at], spread[:, at], between)
            one, taken = _where(best.first, view < 0, absent)
            two = 1 - one
            between = one.unsqueeze(-1) * cross[:, :, at] * two.unsqueeze(-2)
            linear = one.unsqueeze(-1) * own * one.unsqueeze(-2) + two.unsqueeze(-1) * table[:, at][:, :, at] * two.unsqueeze(-2)
            linear = linear + between + between.transpose(-1, -2)
            mean = torch.where(taken, best.mean, one * mean + two * values[:, at])
            own = with_diagonal(linear, torch.where(taken, best.variance, linear.diagonal(dim1=-2, dim2=-1)))
            cross = one.unsqueeze(-1) * cross + two.unsqueeze(-1) * table[:, at]
            for other, block in others.items():
                others[other] = one.unsqueeze(-1) * block + two.unsqueeze(-1) * self.covariance(source, other)[:, at]
            absent = absent & (view < 0)
        self.mean[name] = mean.view(-1, *operation.shape)
        self._set_own(name, own)
        for other, block in others.items():
            self._covariance[name, other] = block

    @_add.register
    def _(self, operation: Combination, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        terms = list(zip(operation.coefficients, sources, strict=True))
        self.mean[name] = sum((c * self.mean[node] for c, node in terms), torch.zeros(()).to(self.mean[sources[0]]))
        self._set_own(name, sum((c * d * self.covariance(a, b) for c, a in terms for d, b in terms), torch.zeros(1)[0]))
        for other in keep:
            self._covariance[name, other] = sum((c * self.covariance(node, other) for c, node in terms), torch.zeros(1)[0])

    @_add.register
    def _(self, operation: Concatenation, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        parts, order = [], 0
        for node in sources:
            shape = self.mean[node].shape[1:]
            parts.append(torch.arange(order, order + math.prod(shape), device=self.mean[node].device).view(1, *shape))
            order += math.prod(shape)
        places = torch.cat(parts, operation.dim).flatten()
        self.mean[name] = torch.cat([self.mean[node] for node in sources], operation.dim)
        rows = [torch.cat(self._same_batch([self.covariance(a, b) for b in sources]), -1) for a in sources]
        self._set_own(name, torch.cat(self._same_batch(rows), -2)[:, places][:, :, places])
        for other in keep:
            blocks = self._same_batch([self.covariance(node, other) for node in sources])
            self._covariance[name, other] = torch.cat(blocks, -2)[:, places]

    def _set_own(self, name: str, covariance: Tensor) -> None:
        # Products of matrices in another order round differently; half the sum is exactly symmetric.
        self._covariance[name, name] = 0.5 * (covariance + covariance.transpose(-1, -2))

    @staticmethod
    def _same_batch(blocks: Sequence[Tensor]) -> list[Tensor]:
        batch = max(len(block) for block in blocks)
        return [block.expand(batch, -1, -1) for block in blocks]


def _where(first: Tensor, missing: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the running maximum, and where there really are two values to compare."""
    first = torch.where(missing, torch.ones_like(first), first)
    first = torch.where(absent & ~missing, torch.zeros_like(first), first)
    return first, ~(missing | absent)
