"""Training for randomized smoothing as hooks: Gaussian augmentation, consistency, MACER, latent noise.

All noise levels are on raw [0, 1] pixels, before the normalisation inside the model, except the latent one.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, Strict
from torch import Tensor
from torch.nn import functional as F

from rsplugins.attacks.inputs import cross_entropy, full
from rsplugins.errors import ParameterError
from rsplugins.parameters import NonNegative, Positive, Settings, Sigma, settings
from rsplugins.training.hooks import Batch, Start, hookimpl, weighted_cross_entropy


@settings
class GaussianAugmentation(Settings):
    """Gaussian augmentation (Cohen et al., ICML 2019): cross-entropy on x + N(0, sigma^2 I), not clipped.

    Attributes:
        sigma: raw [0, 1] pixels; use the sigma of the certificate.
    """

    sigma: Sigma

    @hookimpl
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return noisy images."""
        return batch.images + self.sigma * batch.gaussian(batch.images)


@settings
class _ManySamples(GaussianAugmentation):
    """Several noisy copies of each image in one forward pass.

    Attributes:
        samples: copies of each image, m.
    """

    samples: Annotated[int, Field(ge=2), Strict()] = 2

    @hookimpl
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return (B * m, C, H, W): the m copies of an image follow one another."""
        copies = batch.images.repeat_interleave(self.samples, dim=0)
        return copies + self.sigma * batch.gaussian(copies)

    def sampled(self, batch: Batch) -> Tensor:
        """Return the logits (B, m, K), and leave their mean in ``batch.scores`` for whoever measures accuracy."""
        scores = batch.logits
        logits = scores.view(-1, self.samples, scores.shape[1])
        batch.scores = logits.detach().mean(1)
        return logits


@settings
class Consistency(_ManySamples):
    """Consistency regularisation (Jeong and Shin, NeurIPS 2020).

    mean CE over the noisy copies + lambda_ mean_i KL(p_mean || p_i) + eta H(p_mean), p_mean the average prediction.

    Attributes:
        lambda_: weight of the KL term.
        eta: weight of the entropy of the average prediction.
    """

    lambda_: NonNegative = 10.0
    eta: NonNegative = 0.5

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the objective."""
        return consistency_loss(self.sampled(batch), batch.labels, lambda_=self.lambda_, eta=self.eta)


@settings
class Macer(_ManySamples):
    """MACER (Zhai et al., ICLR 2020): maximise the smoothed classifier's soft radius where it is right.

    Attributes:
        lambda_: weight of the radius term; 16 on MNIST, 12 (sigma .25) and 4 (sigma .5) on CIFAR-10 in the released scripts.
        beta: inverse temperature of the soft radius.
        gamma: radii, in units of sigma, beyond which an input no longer counts.
    """

    soft_labels: ClassVar[bool] = False

    samples: Annotated[int, Field(ge=2), Strict()] = 16
    lambda_: NonNegative = 12.0
    beta: Positive = 16.0
    gamma: Positive = 8.0

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the objective."""
        return macer_loss(
            self.sampled(batch), batch.labels, sigma=self.sigma, lambda_=self.lambda_, beta=self.beta, gamma=self.gamma
        )


@settings
class LatentNoise(Settings):
    """Training for latent smoothing: cross-entropy of head(encoder(x) + N(0, sigma^2 I)).

    The network inside the Classifier has an ``encoder`` and a ``head``, as the encoder-head pairs of ``rsplugins.models`` have.
    It runs as it is, not compiled.

    Attributes:
        sigma: in the units of the latent, so not bounded by those of pixels.
    """

    sigma: Positive

    @hookimpl
    def on_start(self, start: Start) -> None:
        """Refuse a network without encoder and head."""
        if start.model is not None:
            _split(start.model)

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the cross-entropy on noisy latents."""
        # A compiled model does not notice a hook that comes after its first call.
        model = getattr(batch.model, "_orig_mod", batch.model)
        encoder = _split(model)

        def add_noise(module: torch.nn.Module, arguments: tuple[Tensor, ...], latent: Tensor) -> Tensor:
            return latent + self.sigma * batch.gaussian(latent)

        handle = encoder.register_forward_hook(add_noise)
        try:
            batch.scores = full(model(batch.perturbed))
        finally:
            handle.remove()
        return weighted_cross_entropy(batch.scores, batch.labels, weights)


def _split(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        encoder, head = getattr(module, "encoder", None), getattr(module, "head", None)
        if isinstance(encoder, torch.nn.Module) and isinstance(head, torch.nn.Module):
            return encoder
    raise ParameterError(
        "Latent-noise training needs a network with an encoder and a head, and this one has none.",
        fix="Choose an architecture that is an encoder-head pair, or give the module attributes `encoder` and `head`.",
    )


def consistency_loss(logits: Tensor, labels: Tensor, *, lambda_: float, eta: float) -> Tensor:
    """Return the consistency objective, a scalar.

    Args:
        logits: (B, m, K) of m noisy copies.
        labels: (B,), or soft ones, (B, K).
        lambda_: weight of the KL term.
        eta: weight of the entropy term.
    """
    m = logits.shape[1]
    classification = cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(m, dim=0))
    logarithm = F.log_softmax(logits, dim=2)
    average = logarithm.exp().mean(1).clamp_min(1e-7)
    divergence = (average[:, None] * (average.log()[:, None] - logarithm)).sum(2).mean()
    entropy = -(average * average.log()).sum(1).mean()
    objective: Tensor = classification + lambda_ * divergence + eta * entropy
    return objective


def macer_loss(logits: Tensor, labels: Tensor, *, sigma: float, lambda_: float, beta: float, gamma: float) -> Tensor:
    """Return the MACER objective, a scalar.

    -log of the mean softmax, plus lambda_ sigma/2 times the hinge gamma - (Phi^-1(p_1) - Phi^-1(p_2)) over inputs that are
    right, with p the mean of softmax(beta logits); inputs whose gap is not finite or above gamma do not count. Both sums are
    divided by B.

    Args:
        logits: (B, m, K) of m noisy copies.
        labels: (B,).
        sigma: noise level.
        lambda_: weight of the radius term.
        beta: inverse temperature.
        gamma: hinge.
    """
    classification = F.nll_loss((F.softmax(logits, dim=2).mean(1) + 1e-10).log(), labels)
    hinge = quantile_hinge(F.softmax(beta * logits, dim=2).mean(1), labels, gamma)
    objective: Tensor = classification + lambda_ * sigma / 2 * hinge / len(labels)
    return objective


def quantile_hinge(probabilities: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return the sum of gamma - (Phi^-1(p_1) - Phi^-1(p_2)) over inputs that are right, p_1 and p_2 the two largest.

    Inputs whose gap is not finite or above gamma do not count.

    Args:
        probabilities: (B, K).
        labels: (B,).
        gamma: hinge.
    """
    values, classes = probabilities.topk(2)
    # Chosen by index before the quantile function, whose gradient is infinite at 0 and 1: a mask after it would give NaN.
    inside = (values > 0.0).all(1) & (values < 1.0).all(1)
    counted = torch.special.ndtri(values.detach()).diff(dim=1)[:, 0].abs() <= gamma
    chosen = values[inside & counted & (classes[:, 0] == labels)]
    gap = torch.special.ndtri(chosen[:, 0]) - torch.special.ndtri(chosen[:, 1])
    hinges: Tensor = gamma - gap
    return hinges.sum()
