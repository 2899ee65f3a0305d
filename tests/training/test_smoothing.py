from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from rsplugins.errors import ParameterError
from rsplugins.training import Batch, Consistency, GaussianAugmentation, Hooks, LatentNoise, Macer
from rsplugins.training.smoothing import consistency_loss, macer_loss
from tests.training.cases import batch, small_net


def test_gaussian_augmentation_adds_unclipped_noise_of_that_size():
    images = torch.rand(64, 1, 16, 16)
    step = Batch(small_net(), images, torch.zeros(64, dtype=torch.long))
    noise = GaussianAugmentation(sigma=0.5).perturb(step) - images
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert (images + noise).min() < -0.3


def test_noise_keeps_the_memory_layout():
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    step = Batch(small_net(), images, torch.zeros(4, dtype=torch.long))
    assert GaussianAugmentation(sigma=0.5).perturb(step).is_contiguous(memory_format=torch.channels_last)


def test_consistency_against_a_slow_reference():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, 4), torch.randint(0, 4, (5,))
    total = 0.0
    for i in range(5):
        p = [logits[i, j].softmax(0).tolist() for j in range(3)]
        mean = [sum(row[k] for row in p) / 3 for k in range(4)]
        cross = -sum(math.log(row[labels[i]]) for row in p) / 3
        kl = sum(sum(mean[k] * math.log(mean[k] / row[k]) for k in range(4)) for row in p) / 3
        entropy = -sum(value * math.log(value) for value in mean)
        total += cross + 10 * kl + 0.5 * entropy
    assert consistency_loss(logits, labels, lambda_=10.0, eta=0.5).item() == pytest.approx(total / 5, rel=1e-5)


def test_macer_against_a_slow_reference():
    torch.manual_seed(1)
    logits, labels = 0.2 * torch.randn(12, 4, 3), torch.randint(0, 3, (12,))
    sigma, lam, beta, gamma = 0.5, 12.0, 16.0, 8.0
    total, counted = 0.0, 0
    for i in range(12):
        soft = logits[i].softmax(1).mean(0).tolist()
        total -= math.log(soft[labels[i]])
        sharp = (beta * logits[i]).softmax(1).mean(0).double()
        order = sharp.argsort(descending=True).tolist()
        gap = norm.ppf(sharp[order[0]]) - norm.ppf(sharp[order[1]])
        if order[0] == labels[i] and gap <= gamma:
            counted += 1
            total += lam * sigma / 2 * (gamma - gap)
    assert 2 <= counted < 12
    got = macer_loss(logits, labels, sigma=sigma, lambda_=lam, beta=beta, gamma=gamma)
    assert got.item() == pytest.approx(total / 12, rel=1e-4)


def test_macer_classifies_by_the_mean_of_the_softmaxes():
    # Without the hinge, and with copies that disagree: the softmax of the mean logits would be another number.
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]], [[0.0, 0.0, 4.0], [0.0, 0.0, 0.0]]])
    rows = [[[math.exp(z) / sum(map(math.exp, copy)) for z in copy] for copy in image] for image in logits.tolist()]
    expected = -(math.log((rows[0][0][0] + rows[0][1][0]) / 2) + math.log((rows[1][0][2] + rows[1][1][2]) / 2)) / 2
    loss = macer_loss(logits, torch.tensor([0, 2]), sigma=0.5, lambda_=0.0, beta=16.0, gamma=8.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_macer_stays_finite_where_predictions_are_certain():
    logits = torch.tensor([[[60.0, 0.0], [60.0, 0.0]], [[0.1, 0.0], [0.0, 0.1]]], requires_grad=True)
    loss = macer_loss(logits, torch.tensor([0, 0]), sigma=0.25, lambda_=12.0, beta=16.0, gamma=8.0)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("make", [Consistency, Macer])
def test_many_samples_are_copies_of_the_same_image(make):
    (images, labels), hook = batch(), make(sigma=0.01, samples=4)
    step = Batch(small_net(), images, labels)
    loss = Hooks(hook).run(step)
    assert step.perturbed.shape == (24, 1, 4, 4)
    noise = (step.perturbed.view(6, 4, 1, 4, 4) - images[:, None]).flatten(2)
    assert noise.abs().max() < 0.1
    # Each copy has noise of its own.
    assert all(not torch.allclose(noise[:, i], noise[:, j]) for i in range(4) for j in range(i))
    assert step.scores.shape == (6, 3)
    loss.backward()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Flatten(), nn.Linear(16, 3)
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        latent = self.encoder(x)
        self.seen.append(latent)
        return self.head(latent)


def test_latent_noise_is_added_between_encoder_and_head_and_only_in_training_steps():
    pair, (images, labels) = Pair(), batch(200)
    Hooks(LatentNoise(sigma=5.0), model=pair).training_loss(pair, images, labels, epoch=0)
    assert (pair.seen[0] - images.flatten(1)).std().item() == pytest.approx(5.0, rel=0.05)
    pair(images)
    assert torch.equal(pair.seen[1], images.flatten(1))
    with pytest.raises(ParameterError, match="encoder and a head"):
        Hooks(LatentNoise(sigma=5.0), model=small_net())


class _Compiled(nn.Module):
    """As torch.compile after a first call: it does not notice hooks that come later."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod, self.code = module, copy.deepcopy(module)

    def forward(self, x):
        return self.code(x)


def test_latent_noise_reaches_a_compiled_model():
    pair = Pair()
    images, labels = batch()
    clean = Hooks(LatentNoise(sigma=1e-9), model=pair).training_loss(pair, images, labels, epoch=0)
    noisy = Hooks(LatentNoise(sigma=5.0), model=pair).training_loss(_Compiled(pair), images, labels, epoch=0)
    assert abs(float(noisy.detach()) - float(clean.detach())) > 0.01
