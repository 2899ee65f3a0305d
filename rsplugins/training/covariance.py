"""Radius maximisation by propagated covariances (Zhen, Chakraborty, Singh, CVPR 2021) as a training hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.parameters import Flag, NonNegative, Positive, Whole, settings
from rsplugins.training.hooks import Batch, hookimpl
from rsplugins.training.smoothing import GaussianAugmentation, quantile_hinge

if TYPE_CHECKING:
    from rsplugins.moments.network import Propagation


@settings
class CovarianceTraining(GaussianAugmentation):
    """Cross-entropy of the propagated mean plus two hinges on the radius, with one propagation in place of many samples.

    As in the released code one noise draw is added to the image as well. What is maximised is an estimate: certify with
    ``--method gaussian`` afterwards. A chain of convolutions, linear layers and ReLUs needs nothing else; other networks need
    auto-LiRPA, and no batch normalisation in training mode.

    Attributes:
        lambda_: weight of the hinges; 0.5 was the best of the paper's ablation.
        gamma: radii, in units of sigma, beyond which an input no longer counts.
        beta: inverse temperature of the second hinge.
        burn_in: first epoch with the hinges; before it the cross-entropy alone counts, without propagation.
        representation: ``"channel"``, the paper's, with only two rows of the last covariance, as in the released code; or
            ``"full"`` for small networks.
        inflation: of ``"channel"``.
        detach: keep the gradient out of the covariance, as the released code does.
    """

    soft_labels: ClassVar[bool] = False

    lambda_: NonNegative = 0.5
    gamma: Positive = 8.0
    beta: Positive = 16.0
    burn_in: Whole = 0
    representation: Literal["channel", "full"] = "channel"
    inflation: NonNegative = 0.1
    detach: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._network: Propagation | None = None

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the objective, or None during burn-in."""
        # Made at the first step, burn-in or not: what it lacks is said before any epoch is spent.
        network = self._propagation(batch)
        if batch.epoch < self.burn_in:
            return None
        # The square roots and quantiles of moments need more than bfloat16.
        with torch.autocast(batch.images.device.type, enabled=False):
            mean, pair = self._propagate(network, batch)
        batch.scores = mean.detach()
        pair = pair.detach() if self.detach else pair
        return covariance_loss(mean, pair, batch.labels, lambda_=self.lambda_, gamma=self.gamma, beta=self.beta)

    def _propagation(self, batch: Batch) -> Propagation:
        from rsplugins.moments.chain import propagation

        if self._network is None:
            with torch.autocast(batch.images.device.type, enabled=False):
                self._network = propagation(getattr(batch.model, "_orig_mod", batch.model), batch.images)
        return self._network

    def _propagate(self, network: Propagation, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the means (B, K), and the covariances (B, 2, 2) of the two largest."""
        from rsplugins.moments import Full, Pairs

        if self.representation == "full":
            mean, covariance = network.propagate(batch.perturbed, self.sigma, Full())
            classes, rows = mean.topk(2).indices, torch.arange(len(mean), device=mean.device)[:, None, None]
            return mean, covariance[rows, classes[:, :, None], classes[:, None, :]]
        pairs = Pairs(self.inflation)
        logits = network.walk(batch.perturbed, self.sigma, pairs)
        mean = pairs.mean[logits]
        return mean, pairs.pair(logits, mean.topk(2).indices)


def covariance_loss(mean: Tensor, pair: Tensor, labels: Tensor, *, lambda_: float, gamma: float, beta: float) -> Tensor:
    """Return the objective of radius maximisation, a scalar.

    CE(mu, y) + lambda_ / B * (sum over right inputs of relu(gamma - (mu_A - mu_B) / sqrt(S_AA + S_BB + 2 |S_AB|)), plus the sum
    of gamma - (Phi^-1(p_1) - Phi^-1(p_2)) with p = softmax(beta mu), as MACER counts it).

    Args:
        mean: (B, K) of the logits.
        pair: (B, 2, 2), the covariance of the two largest.
        labels: (B,).
        lambda_: weight of the hinges.
        gamma: hinge.
        beta: inverse temperature.
    """
    values, classes = mean.topk(2)
    right = classes[:, 0] == labels
    # Chosen before the root, whose gradient is infinite at 0.
    variance = (pair[:, 0, 0] + pair[:, 1, 1] + 2.0 * pair[:, 0, 1].abs())[right].clamp_min(torch.finfo(mean.dtype).tiny)
    radius = (values[:, 0] - values[:, 1])[right] / variance.sqrt()
    hinges = F.relu(gamma - radius).sum() + quantile_hinge(F.softmax(beta * mean, dim=1), labels, gamma)
    objective: Tensor = F.cross_entropy(mean, labels) + lambda_ * hinges / len(labels)
    return objective
