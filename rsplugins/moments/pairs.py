"""The representation for training: as ``channel``, with of the logits' covariance only what a pair of classes needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsplugins.moments.channel import Channel
from rsplugins.moments.operations import Elementwise, Linear, Operation


@dataclass(frozen=True)
class _Waiting:
    """A covariance S (B, n, n) of vectors that is not written out.

    Attributes:
        between: V S V^T, (B, r, r), for rows V (B, r, n).
        variances: the diagonal of A S A^T, (B, m), for one matrix A (m, n).
    """

    between: Callable[[Tensor], Tensor]
    variances: Callable[[Tensor], Tensor]


class Pairs(Channel):
    """Means in full, a (C, C) covariance of feature maps, and of what comes after flattening only what :meth:`pair` asks for.

    The first linear layer after a feature map makes a covariance of hundreds of features out of every position, which costs more
    than all convolutions. Here the rows of two logits are pulled back through the linear layers instead. Activations between
    linear layers are taken to first order, D S D with the exact variances, where :class:`Channel` has exact covariances.

    Args:
        inflation: see :class:`Channel`.
    """

    def __init__(self, inflation: float = 0.0) -> None:
        super().__init__(inflation)
        self._waiting: dict[str, _Waiting] = {}

    def pair(self, name: str, classes: Tensor) -> Tensor:
        """Return the covariance (B, 2, 2) of two logits an input, the classes (B, 2)."""
        if name not in self._waiting:
            covariance = self.covariance(name, name).expand(len(classes), -1, -1)
            rows = covariance.gather(1, classes.unsqueeze(2).expand(-1, -1, covariance.shape[2]))
            return rows.gather(2, classes.unsqueeze(1).expand(-1, 2, -1))
        count = self.mean[name].shape[1]
        return self._waiting[name].between(torch.nn.functional.one_hot(classes, count).to(self.mean[name]))

    def step(self, name: str, operation: Operation, sources: Sequence[str], keep: Sequence[str]) -> None:
        """Add a node and forget what is no longer needed."""
        waiting = None if keep else self._later(name, operation, sources[0])
        if waiting is None:
            for source in {*sources, *keep} & self._waiting.keys():
                self._write_out(source)
            super().step(name, operation, sources, keep)
            return
        self.mean, self._covariance, self._waiting = {name: self.mean[name]}, {}, {name: waiting}

    def output(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the logits, as :class:`Channel` does."""
        if name in self._waiting:
            self._write_out(name)
        return super().output(name)

    def _later(self, name: str, operation: Operation, source: str) -> _Waiting | None:
        """Set the mean and return the covariance that waits; None where it has to be written out."""
        if isinstance(operation, Linear) and operation.rows is not None:
            before = self._waiting.get(source) or _spread(self.covariance(source, source))
            self.mean[name] = operation.apply(self.mean[source]) + operation.offset
            return _mixed(before, operation.rows)
        if isinstance(operation, Elementwise) and source in self._waiting:
            before, mean = self._waiting[source], self.mean[source]
            variance = before.variances(torch.eye(mean.shape[1]).to(mean))
            own = operation.activation.moments(mean, variance)
            self.mean[name] = own.mean
            return _activated(before, own.slope, own.variance - own.slope.square() * variance)
        return None

    def _write_out(self, name: str) -> None:
        count = self.mean[name].shape[1]
        identity = torch.eye(count).to(self.mean[name]).expand(len(self.mean[name]), -1, -1)
        self._covariance[name, name] = self._waiting.pop(name).between(identity)


def _spread(covariance: Tensor) -> _Waiting:
    """The features of a flattened map: positions independent, each with the same covariance (B or 1, C, C)."""
    channels = covariance.shape[-1]

    def between(rows: Tensor) -> Tensor:
        by_channel = rows.view(*rows.shape[:2], channels, -1)
        return (covariance.unsqueeze(1) @ by_channel).flatten(2) @ rows.transpose(1, 2)

    def variances(matrix: Tensor) -> Tensor:
        by_channel = matrix.view(len(matrix), channels, -1)
        return covariance.flatten(1) @ (by_channel @ by_channel.transpose(1, 2)).flatten(1).t()

    return _Waiting(between, variances)


def _mixed(before: _Waiting, pull: Callable[[Tensor], Tensor]) -> _Waiting:
    """A linear layer."""
    return _Waiting(lambda rows: before.between(pull(rows)), lambda matrix: before.variances(pull(matrix)))


def _activated(before: _Waiting, slope: Tensor, rest: Tensor) -> _Waiting:
    """An activation to first order: D S D with the slopes (B, n), and the ``rest`` (B, n) of the variances, at least 0."""

    def between(rows: Tensor) -> Tensor:
        linear = before.between(rows * slope.unsqueeze(1))
        return linear + (rows * rest.unsqueeze(1)) @ rows.transpose(1, 2)

    return _Waiting(between, lambda matrix: between(matrix.expand(len(slope), -1, -1)).diagonal(dim1=1, dim2=2))
