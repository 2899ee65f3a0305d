"""Adversarial training and its relatives as training hooks: AT, FAT, TRADES and MART."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.attacks import pgd
from rsplugins.attacks.inputs import cross_entropy, full
from rsplugins.errors import ParameterError
from rsplugins.parameters import Count, Eps, Flag, NonNegative, Positive, Settings, Whole, settings
from rsplugins.training.hooks import Batch, hookimpl, weighted_cross_entropy, weighted_mean


@settings
class AdversarialTraining(Settings):
    """AT (Madry et al., ICLR 2018): the cross-entropy on PGD images.

    Attributes:
        eps: l-infinity budget, raw [0, 1] pixels.
        step_size: of PGD; None takes eps / 4, the 2/255 of 8/255.
        steps: of PGD.
        random_start: whether PGD starts at a uniform point of the ball.
        ramp: epochs over which eps and the step grow linearly to their values; at eps 0.3 on MNIST a network that is attacked in
            full from the first step can stay at chance.
    """

    eps: Eps
    step_size: Positive | None = None
    steps: Count = 10
    random_start: Flag = True
    ramp: NonNegative = 0.0

    @property
    def step(self) -> float:
        """The step size at full eps."""
        return self.eps / 4 if self.step_size is None else self.step_size

    def attack(self, batch: Batch, *, objective: pgd.Objective | None = None, stop_after: int | None = None) -> Tensor:
        """Attack the batch's clean images from a uniform start, and leave the geometry in the batch."""
        start = batch.uniform(batch.images, self.eps * self.grown(batch)) if self.random_start else None
        return self._pgd(batch, start, objective, stop_after)

    def _pgd(self, batch: Batch, start: Tensor | None, objective: pgd.Objective | None, stop_after: int | None) -> Tensor:
        grown = self.grown(batch)
        images, batch.geometry = pgd.pgd(
            batch.model,
            batch.images,
            batch.labels,
            eps=self.eps * grown,
            step_size=self.step * grown,
            steps=self.steps,
            start=start,
            objective=objective,
            stop_after=stop_after,
            check=False,
        )
        return images

    def grown(self, batch: Batch) -> float:
        """Return the share of eps in use, above 0 and at most 1."""
        return min(1.0, max(batch.progress, 1e-3) / self.ramp) if self.ramp > 0 else 1.0

    @hookimpl
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return PGD images."""
        return self.attack(batch)

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the weighted mean cross-entropy of the PGD images."""
        return weighted_cross_entropy(batch.logits, batch.labels, weights)


@settings
class FriendlyAdversarialTraining(AdversarialTraining):
    """FAT (Zhang et al., ICML 2020): PGD that stops tau steps after the first misclassified iterate.

    Attributes:
        tau: pairs (first epoch, tau), counted from 0; the default is that of GAIR-FAT's released code.
    """

    soft_labels: ClassVar[bool] = False

    tau: tuple[tuple[Whole, Whole], ...] = ((0, 0), (40, 3), (70, 6))

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = [epoch for epoch, _ in self.tau]
        if not epochs or epochs[0] != 0 or epochs != sorted(set(epochs)):
            raise ParameterError(
                f"tau is {self.tau}; its epochs must start at 0 and increase.", fix="Write tau = [[0, 0], [40, 3], [70, 6]]."
            )

    def tau_at(self, epoch: int) -> int:
        """Return tau in an epoch counted from 0."""
        return next(tau for start, tau in reversed(self.tau) if epoch >= start)

    @hookimpl
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return friendly PGD images, each in its own place."""
        return self.attack(batch, stop_after=self.tau_at(batch.epoch))


@settings
class Trades(AdversarialTraining):
    """TRADES (Zhang et al., ICML 2019): CE(f(x), y) + beta KL(p(x) || p(x')), x' maximising the KL.

    Weights multiply the KL term of each input.

    Attributes:
        beta: weight of the KL term; 6 in the paper's CIFAR-10 runs.
    """

    beta: NonNegative = 6.0

    @hookimpl
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return images that maximise the KL from the clean prediction, started a little beside the clean image."""
        with pgd.evaluation_mode(batch.model), torch.no_grad():
            clean = full(batch.model(batch.images))
        # torch 2.3 keeps the casts of weights made without gradients, and the loss would not reach the weights.
        torch.clear_autocast_cache()
        return self._pgd(batch, self.small_start(batch), pgd.divergence(clean), None)

    def small_start(self, batch: Batch) -> Tensor | None:
        """Return the Gaussian offset of 0.001 at which TRADES starts: at the clean image itself the KL has no gradient."""
        return 0.001 * batch.gaussian(batch.images) if self.random_start else None

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the TRADES objective."""
        perturbed, clean = batch.logits, full(batch.model(batch.images))
        return cross_entropy(clean, batch.labels) + self.beta * weighted_mean(kl(clean, perturbed), weights)


@settings
class Mart(AdversarialTraining):
    """MART (Wang et al., ICLR 2020): boosted cross-entropy plus a KL that weighs misclassified inputs more.

    BCE(x', y) + beta (1 - p_y(x)) KL(p(x) || p(x')), with BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x')). Weights multiply
    the whole loss of each input.

    Attributes:
        beta: weight of the KL term; 5 in the paper.
    """

    soft_labels: ClassVar[bool] = False

    beta: NonNegative = 5.0

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the MART objective."""
        perturbed, clean = batch.logits, full(batch.model(batch.images))
        others = torch.log(1.0 - best_other(perturbed, batch.labels) + 1e-4)
        boosted = F.cross_entropy(perturbed, batch.labels, reduction="none") - others
        doubt = 1.0 - clean.softmax(1).gather(1, batch.labels[:, None])[:, 0]
        return weighted_mean(boosted + self.beta * doubt * kl(clean, perturbed), weights)


def kl(reference: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax(reference) || softmax(other)) for each row, shape (B,), from logits (B, K)."""
    return F.kl_div(F.log_softmax(other, dim=1), F.log_softmax(reference, dim=1), reduction="none", log_target=True).sum(1)


def best_other(logits: Tensor, labels: Tensor) -> Tensor:
    """Return max_{k != y} p_k, shape (B,), from logits (B, K)."""
    return logits.softmax(1).scatter(1, labels[:, None], -1.0).amax(1)
