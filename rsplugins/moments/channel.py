"""The representation ``channel``: one covariance over the channels for all positions, positions independent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Literal

import torch
from torch import Tensor

from rsplugins.errors import ParameterError
from rsplugins.moments.gaussian import larger, with_diagonal
from rsplugins.moments.operations import Combination, Concatenation, Elementwise, Linear, Maximum, Operation


class Channel:
    r"""Means in full, and one (C, C) covariance an image: Zhen, Chakraborty, Singh (CVPR 2021), with moments put right.

    A linear operator is exact while its input positions are independent, as those of the noise are: the first convolution is
    exact where its window does not touch the padding. Afterwards positions are correlated and this representation forgets it:
    the covariance of later convolutions comes out too small for kernels whose taps agree in sign, too large where they cancel.
    Neither ``inflation=0.1`` (the paper's) nor any other constant bounds that; ``"sound"`` multiplies by the number of taps T,
    and

    .. math:: \mathrm{Cov}\Big(\sum_{t=1}^T y_t\Big) \preceq T \sum_{t=1}^T \mathrm{Cov}(y_t)

    holds whatever the correlation. That is an upper bound for this step only: the averaging over positions in activations is not.

    Args:
        inflation: of every sum over more than one position, after the first: S is multiplied by 1 + inflation; or ``"sound"``.
        published: use the published rules: ReLU adds 0.1 I to the covariance, pooling and additions take branches as independent,
            and the first layer is inflated too.
    """

    RELU_NOISE = 0.1

    def __init__(self, inflation: float | Literal["sound"] = 0.0, *, published: bool = False) -> None:
        self.inflation, self.published = inflation, published
        self.mean: dict[str, Tensor] = {}
        self._covariance: dict[tuple[str, str], Tensor] = {}
        self._white: set[str] = set()

    def start(self, name: str, mean: Tensor, sigma: float) -> None:
        """Begin with N(mean, sigma^2 I)."""
        self.mean[name] = mean
        self._covariance[name, name] = sigma**2 * torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device).unsqueeze(0)
        self._white.add(name)

    def step(self, name: str, operation: Operation, sources: Sequence[str], keep: Sequence[str]) -> None:
        """Add a node and forget what is no longer needed."""
        self._add(operation, name, sources, keep)
        alive = {name, *keep}
        self.mean = {node: value for node, value in self.mean.items() if node in alive}
        self._covariance = {pair: value for pair, value in self._covariance.items() if alive.issuperset(pair)}

    def output(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the logits.

        Raises:
            ParameterError: when the output is not one number a channel.
        """
        mean, covariance = self.mean[name], self.covariance(name, name)
        if mean.shape[1:] != covariance.shape[-1:]:
            raise ParameterError(
                f"The output has shape {tuple(mean.shape[1:])} but {covariance.shape[-1]} channels.",
                cause="the network ends in a reshape of feature maps.",
                fix="Use representation='low-rank' or 'full'.",
            )
        return mean, covariance.expand(len(mean), -1, -1)

    def covariance(self, a: str, b: str) -> Tensor:
        """Return the covariance between channels of two nodes at one position, (B or 1, C_a, C_b)."""
        if (a, b) in self._covariance:
            return self._covariance[a, b]
        return self._covariance[b, a].transpose(-1, -2)

    def _by_position(self, name: str) -> Tensor:
        return self.mean[name].reshape(len(self.mean[name]), self.covariance(name, name).shape[-1], -1)

    @singledispatchmethod
    def _add(self, operation: Operation, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        raise TypeError(f"{type(operation).__name__} is not an operation")

    @_add.register
    def _(self, operation: Linear, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        if operation.mixing is None or operation.aligned is None:
            raise ParameterError(
                f"The operator at {name} mixes channels and positions.",
                cause="the representation 'channel' knows only one covariance over the channels for all positions.",
                fix="Use representation='low-rank' or 'full'.",
            )
        taps = operation.taps or self._by_position(source).shape[-1]
        self.mean[name] = operation.apply(self.mean[source]) + operation.offset
        factor = 1.0 if operation.taps == 0 and self.inflation != "sound" else self._inflation(source, taps)
        self._covariance[name, name] = factor * operation.mixing(self.covariance(source, source))
        for other in keep:
            before = self.covariance(source, other)
            if operation.taps == 0 and taps > 1:
                shape = (len(before), self.mean[name].shape[1], before.shape[-1])
                self._covariance[name, other] = torch.zeros(shape, dtype=before.dtype, device=before.device)
            else:
                self._covariance[name, other] = operation.aligned(before)
        if operation.pointwise and source in self._white:
            self._white.add(name)

    def _inflation(self, source: str, taps: int) -> float:
        if taps == 1 or (source in self._white and not self.published):
            return 1.0
        return float(taps) if self.inflation == "sound" else 1.0 + float(self.inflation)

    @_add.register
    def _(self, operation: Elementwise, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        mean, before = self._by_position(source), self.covariance(source, source)
        variance = before.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        if self.published:
            self.mean[name] = operation.activation.moments(mean, variance).mean.view_as(self.mean[source])
            self._covariance[name, name] = with_diagonal(before, before.diagonal(dim1=-2, dim2=-1) + self.RELU_NOISE)
            for other in keep:
                self._covariance[name, other] = self.covariance(source, other)
            return
        own = operation.activation.moments(mean, variance)
        self.mean[name] = own.mean.view_as(self.mean[source])
        if mean.shape[-1] == 1:
            self._covariance[name, name] = operation.activation.covariance(mean[..., 0], before)
        else:
            linear = before * _average(own.slope, own.slope)
            self._covariance[name, name] = with_diagonal(linear, own.variance.mean(-1))
        for other in keep:
            self._covariance[name, other] = own.slope.mean(-1).unsqueeze(-1) * self.covariance(source, other)

    @_add.register
    def _(self, operation: Maximum, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        (source,) = sources
        values, before = self.mean[source].flatten(1), self.covariance(source, source)
        channels = before.shape[-1]
        spread = before.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).expand_as(self._by_position(source)).flatten(1)
        present = operation.views[0] >= 0
        mean, variance = values[:, operation.views[0].clamp_min(0)], spread[:, operation.views[0].clamp_min(0)]
        weights = [present.to(values).expand_as(mean)]
        for view in operation.views[1:]:
            at, both = view.clamp_min(0), present & (view >= 0)
            best = larger(mean, variance, values[:, at], spread[:, at], torch.zeros_like(mean))
            one = torch.where(both, best.first, (view < 0).to(values))
            weights = [one * weight for weight in weights] + [1 - one]
            mean = torch.where(both, best.mean, one * mean + (1 - one) * values[:, at])
            variance = torch.where(both, best.variance, one * variance + (1 - one) * spread[:, at])
            present = present | (view >= 0)
        shares = [weight.reshape(len(values), channels, -1) for weight in weights]
        linear = before * torch.stack([_average(share, share) for share in shares]).sum(0)
        self.mean[name] = mean.view(-1, *operation.shape)
        self._covariance[name, name] = with_diagonal(linear, variance.view_as(shares[0]).mean(-1))
        for other in keep:
            # the first place of the window is the one that the output lies on
            self._covariance[name, other] = shares[0].mean(-1).unsqueeze(-1) * self.covariance(source, other)

    @_add.register
    def _(self, operation: Combination, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        terms = list(zip(operation.coefficients, sources, strict=True))
        zero = torch.zeros(()).to(self.mean[sources[0]])
        self.mean[name] = sum((c * self.mean[node] for c, node in terms), zero)
        pairs = [(c * d, a, b) for c, a in terms for d, b in terms if a == b or not self.published]
        self._covariance[name, name] = _nearest(sum((c * self.covariance(a, b) for c, a, b in pairs), zero))
        for other in keep:
            self._covariance[name, other] = sum((c * self.covariance(node, other) for c, node in terms), zero)

    @_add.register
    def _(self, operation: Concatenation, name: str, sources: Sequence[str], keep: Sequence[str]) -> None:
        if operation.dim != 1:
            raise ParameterError(
                f"The concatenation at {name} is along dimension {operation.dim}.",
                cause="the representation 'channel' has one covariance for all positions.",
                fix="Concatenate along the channels, or use representation='low-rank' or 'full'.",
            )
        self.mean[name] = torch.cat([self.mean[node] for node in sources], 1)
        batch = len(self.mean[name])
        rows = [torch.cat([self.covariance(a, b).expand(batch, -1, -1) for b in sources], -1) for a in sources]
        self._covariance[name, name] = _nearest(torch.cat(rows, -2))
        for other in keep:
            self._covariance[name, other] = torch.cat(
                [self.covariance(node, other).expand(batch, -1, -1) for node in sources], -2
            )


def _average(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over positions of the outer products over channels, (B, C, C), positive semi-definite for a = b."""
    return a @ b.transpose(-1, -2) / a.shape[-1]


def _nearest(covariance: Tensor) -> Tensor:
    """Return the covariance without negative eigenvalues.

    Cross-covariances here know the centre taps alone and need not fit the variances of the two branches.
    """
    covariance = 0.5 * (covariance + covariance.transpose(-1, -2))
    values, vectors = torch.linalg.eigh(covariance.detach())
    negative: Tensor = (vectors * values.clamp(max=0).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return covariance - negative
