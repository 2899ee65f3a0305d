from __future__ import annotations

import math
import sys

import pytest
import torch
from scipy.stats import norm
from torch.nn import functional as F

from rsplugins.errors import PluginUnavailableError
from rsplugins.training import Batch, CovarianceTraining, GaussianAugmentation, Hooks
from rsplugins.training.covariance import covariance_loss
from tests.training.cases import batch, small_net


def test_the_objective_against_a_slow_reference():
    torch.manual_seed(2)
    mean, labels = 0.3 * torch.randn(14, 4), torch.randint(0, 4, (14,))
    factor = 0.3 * torch.randn(14, 4, 4)
    covariance = factor @ factor.mT
    total, hinged = 0.0, 0
    for i, y in enumerate(labels.tolist()):
        p = mean[i].double().softmax(0)
        total -= math.log(p[y])
        a, b = mean[i].argsort(descending=True).tolist()[:2]
        if a != y:
            continue
        S = covariance[i].double()
        ratio = float(mean[i, a] - mean[i, b]) / math.sqrt(S[a, a] + S[b, b] + 2 * abs(S[a, b]))
        total += 0.5 * max(0.0, 8.0 - ratio)
        sharp = (16 * mean[i].double()).softmax(0).sort(descending=True).values
        gap = norm.ppf(sharp[0]) - norm.ppf(sharp[1])
        hinged += gap <= 8
        total += 0.5 * (8 - gap) if gap <= 8 else 0.0
    assert hinged >= 2
    largest = mean.topk(2).indices.tolist()
    pair = torch.stack([own[rows][:, rows] for own, rows in zip(covariance, largest, strict=True)])
    found = covariance_loss(mean, pair, labels, lambda_=0.5, gamma=8.0, beta=16.0)
    assert found.item() == pytest.approx(total / 14, rel=1e-4)


def test_gradients_are_finite_where_the_variance_vanishes():
    mean = torch.tensor([[1.0, 0.0], [0.2, 0.1]], requires_grad=True)
    pair = torch.zeros(2, 2, 2, requires_grad=True)
    covariance_loss(mean, pair, torch.tensor([0, 1]), lambda_=0.5, gamma=8.0, beta=16.0).backward()
    assert mean.grad.isfinite().all()
    assert pair.grad.isfinite().all()


@pytest.mark.parametrize("representation", ["channel", "full"])
def test_a_step_through_the_propagation_reaches_the_weights(representation):
    model, (images, labels) = small_net(), batch(12)
    hook = CovarianceTraining(sigma=0.3, representation=representation, inflation=0.0)
    step = Batch(model, images, labels, generator=torch.Generator().manual_seed(0))
    loss = Hooks(hook).run(step)
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    # The propagated mean is that of the logits under noise around the perturbed image.
    noise = 0.3 * torch.randn(3000, *step.perturbed.shape, generator=torch.Generator().manual_seed(1))
    sampled = model((step.perturbed + noise).flatten(0, 1)).unflatten(0, (3000, 12)).mean(0)
    assert (step.scores - sampled).abs().max() < 0.05


def test_a_detached_covariance_and_burn_in():
    model, (images, labels) = small_net(), batch(12)

    def gradient(hook, epoch=1):
        model.zero_grad()
        Hooks(hook).training_loss(model, images, labels, epoch=epoch, generator=torch.Generator().manual_seed(0)).backward()
        return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])

    settings = {"sigma": 0.3, "lambda_": 5.0, "burn_in": 1}
    assert not torch.allclose(gradient(CovarianceTraining(**settings)), gradient(CovarianceTraining(**settings, detach=True)))
    assert torch.equal(gradient(CovarianceTraining(**settings), epoch=0), gradient(GaussianAugmentation(sigma=0.3)))
    assert torch.isfinite(F.relu(gradient(CovarianceTraining(**{**settings, "sigma": 1e-3})))).all()


def test_a_network_that_needs_auto_lirpa_is_refused_before_burn_in_is_spent(monkeypatch):
    monkeypatch.delitem(sys.modules, "auto_LiRPA", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, (images, labels) = torch.nn.Sequential(torch.nn.Tanh(), small_net()), batch(4)
    hook = CovarianceTraining(sigma=0.3, burn_in=5)
    with pytest.raises(PluginUnavailableError, match="auto-LiRPA"):
        Hooks(hook).training_loss(model, images, labels, epoch=0, generator=torch.Generator())
