from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rsplugins.attacks import pgd
from tests.training.cases import TwoClassLinear, batch, small_net


def test_kappa_is_analytic_on_a_linear_model():
    torch.manual_seed(0)
    weight = torch.randn(16)
    model = TwoClassLinear(weight, bias=0.0)
    images = 0.3 + 0.4 * torch.rand(200, 1, 4, 4)
    model.bias = -float((images.flatten(1) @ weight).mean())
    margin = (images.flatten(1) @ weight + model.bias).detach()
    labels = (margin > 0).long()
    steps, step = 10, 0.02
    _, geometry = pgd.pgd(model, images, labels, eps=0.25, step_size=step, steps=steps)
    # Each step moves the score by step * ||w||_1 towards the other class; the first step k with k * that > |margin| crosses.
    exact = margin.abs() / (step * weight.abs().sum())
    expected = torch.tensor([min(steps, math.floor(value) + 1) for value in exact.tolist()])
    decided = (exact - exact.round()).abs() > 1e-3
    assert torch.equal(geometry.first[decided], expected[decided])
    assert torch.equal(geometry.first, geometry.correct)
    assert len(geometry.first.unique()) > 5


def test_kappa_is_zero_for_what_is_wrong_already_and_at_most_k():
    model, (images, labels) = small_net(), batch(64)
    _, geometry = pgd.pgd(model, images, labels, eps=0.1, step_size=0.02, steps=7)
    wrong = model(images).argmax(1) != labels
    assert wrong.any()
    assert (geometry.first[wrong] == 0).all()
    for kappa in (geometry.first, geometry.correct):
        assert kappa.min() >= 0
        assert kappa.max() <= 7


class FlipsBack(nn.Module):
    """Class 0 below .35 and above .55, class 1 between, with a gradient that always pushes x up."""

    def forward(self, x):
        value = x.flatten(1)[:, 0]
        other = ((value > 0.35) & (value < 0.55)).float() * 100 + value
        return torch.stack([torch.zeros_like(value) + 50, other], dim=1)


def test_the_two_definitions_of_kappa_differ_where_a_prediction_flips_back():
    images, labels = torch.full((1, 1, 1, 1), 0.3), torch.zeros(1, dtype=torch.long)
    _, geometry = pgd.pgd(FlipsBack(), images, labels, eps=0.5, step_size=0.1, steps=5)
    # Iterates .3 (right) .4 .5 (wrong) .6 .7 (right again).
    assert geometry.first.item() == 1
    assert geometry.correct.item() == 3


def test_iterates_stay_in_the_ball_and_in_the_pixel_range():
    model, (images, labels) = small_net(), batch(16)
    start = torch.empty_like(images).uniform_(-0.3, 0.3)
    out, _ = pgd.pgd(model, images, labels, eps=0.3, step_size=0.2, steps=4, start=start)
    assert (out - images).abs().max() <= 0.3 + 1e-6
    assert out.min() >= 0
    assert out.max() <= 1


def test_pgd_agrees_with_a_slow_loop():
    model, (images, labels) = small_net(), batch(5)
    out, _ = pgd.pgd(model, images, labels, eps=0.1, step_size=0.03, steps=4)
    for i in range(5):
        x = images[i : i + 1].clone()
        for _ in range(4):
            x.requires_grad_()
            loss = nn.functional.cross_entropy(model(x), labels[i : i + 1])
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach() + 0.03 * gradient.sign()
            x = torch.max(torch.min(x, images[i : i + 1] + 0.1), images[i : i + 1] - 0.1).clamp(0, 1)
        assert torch.allclose(out[i : i + 1], x, atol=1e-6)


def test_the_model_is_attacked_in_eval_mode_and_put_back_module_by_module():
    model, (images, labels) = small_net(batch_norm=True), batch()
    model.train()
    model[2].eval()
    before = model[1].running_mean.clone()
    pgd.pgd(model, images, labels, eps=0.1, step_size=0.1, steps=2)
    assert torch.equal(model[1].running_mean, before)
    assert (model.training, model[1].training, model[2].training) == (True, True, False)


@pytest.mark.parametrize("tau", [0, 2])
def test_early_stopping_goes_tau_steps_beyond_the_first_misclassified_iterate(tau):
    torch.manual_seed(0)
    weight = torch.ones(16) / 16
    model, step = TwoClassLinear(weight, bias=-0.5), 0.01
    images = torch.linspace(0.45, 0.6, 12).view(12, 1, 1, 1).expand(12, 1, 4, 4).contiguous()
    labels = torch.ones(12, dtype=torch.long)
    out, geometry = pgd.pgd(model, images, labels, eps=0.3, step_size=step, steps=10, stop_after=tau)
    moved = ((images - out).abs().amax((1, 2, 3)) / step).round().long()
    assert torch.equal(moved, (geometry.first + tau).clamp(max=10))
    assert (geometry.first[images[:, 0, 0, 0] <= 0.5] == 0).all()


def test_margin_and_divergence_match_slow_references():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    index = torch.tensor([3, 1])
    slow = sum(max(logits[j, k] for k in range(5) if k != labels[i]) - logits[j, labels[i]] for j, i in enumerate(index.tolist()))
    assert torch.allclose(pgd.margin(labels)(logits[:2], index), slow)
    clean = torch.randn(4, 5)
    p, q = clean.softmax(1), logits.softmax(1)
    slow = sum((p[i] * (p[i].log() - q[j].log())).sum() for j, i in enumerate(index.tolist()))
    assert torch.allclose(pgd.divergence(clean)(logits[:2], index), slow, atol=1e-6)
