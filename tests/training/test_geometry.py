from __future__ import annotations

import math

import pytest
import torch

from rsplugins.training.instance_weights import geometry_weights, margin_weights

KAPPA = torch.arange(11)

# METHODS.md, section 5(ii): K = 10, tanh, not normalised.
TABLE = {
    -1.0: [0.9997, 0.9975, 0.982, 0.881, 0.5, 0.119, 0.018, 0.0025, 3e-4, 0, 0],
    0.0: [1, 0.9997, 0.9975, 0.982, 0.881, 0.5, 0.119, 0.018, 0.0025, 3e-4, 0],
}


@pytest.mark.parametrize("lambda_", [-1.0, 0.0])
def test_the_table_of_the_method(lambda_):
    weights = geometry_weights(KAPPA, 10, lambda_, normalise=False)
    assert weights.tolist() == pytest.approx(TABLE[lambda_], abs=6e-4)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_formulas_against_the_definitions(steps):
    for kappa in range(steps + 1):
        for lambda_ in (-2.0, 0.0, 1.5):
            z = lambda_ + 5 * (1 - 2 * kappa / steps)
            expected = {
                "tanh": (1 + math.tanh(z)) / 2,
                "sigmoid": 1 / (1 + math.exp(-z)),
                "discrete": (steps + 1 - kappa) / (steps + 1),
                "tanh-rst": (1 + math.tanh(lambda_ + steps / 2 - kappa)) / 2,
            }
            for scheme, value in expected.items():
                got = geometry_weights(torch.tensor([kappa]), steps, lambda_, scheme, normalise=False).item()
                assert got == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("scheme", ["tanh", "sigmoid", "discrete"])
@pytest.mark.parametrize("lambda_", [-50.0, -5.0, -1.0, 0.0, 3.0, math.inf])
def test_normalised_weights_have_mean_one_and_do_not_increase(scheme, lambda_):
    weights = geometry_weights(KAPPA, 10, lambda_, scheme)
    assert weights.double().mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (weights.diff() <= 0).all()
    assert weights.isfinite().all()


def test_all_inputs_far_from_the_boundary_weigh_the_same_however_low_lambda():
    # The plain formula is 0/0 in float32 here.
    weights = geometry_weights(torch.full((7,), 10), 10, -50.0)
    assert torch.equal(weights, torch.ones(7))


@pytest.mark.parametrize("size", [7, 49, 128])
def test_infinite_lambda_gives_exactly_one(size):
    kappa = torch.randint(0, 11, (size,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(geometry_weights(kappa, 10, math.inf), torch.ones(size))


def test_lambda_moves_the_knee():
    def knee(lambda_):
        return int((geometry_weights(KAPPA, 10, lambda_, normalise=False) > 0.5 + 1e-6).sum())

    assert [knee(value) for value in (-2.0, -1.0, 0.0, 1.0, 2.0)] == [3, 4, 5, 6, 7]


def test_margin_weights_against_a_slow_reference():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(9, 4), torch.randint(0, 4, (9,))
    weights = margin_weights(logits, labels, slope=10.0, bias=-0.5)
    for i in range(9):
        scores = [math.exp(z) for z in logits[i].tolist()]
        p = [score / sum(scores) for score in scores]
        other = max(p[k] for k in range(4) if k != labels[i])
        expected = 3 / (1 + math.exp(-10 * (other - p[labels[i]] - 0.5)))
        assert weights[i].item() == pytest.approx(expected, rel=1e-4)
    assert margin_weights(logits, labels, slope=10.0, bias=-0.5, normalise=True).mean().item() == pytest.approx(1.0, abs=1e-6)
