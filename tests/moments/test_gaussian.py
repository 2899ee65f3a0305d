"""Moments of activations against scipy's quadrature, the closed form with the bivariate normal cdf, and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from rsplugins.moments.activations import Activation, Gelu, LeakyRelu
from rsplugins.moments.gaussian import larger, rectified, rectified_covariance

SCALARS = [(m, s) for m in (-4.0, -0.7, 0.0, 0.3, 2.0) for s in (1e-3, 0.3, 1.0, 1.8)]
ACTIVATIONS = {
    "relu": (LeakyRelu(), lambda x: np.maximum(x, 0), 1e-9),
    "leaky": (LeakyRelu(0.2), lambda x: np.where(x > 0, x, 0.2 * x), 1e-9),
    "gelu": (Gelu(), lambda x: x * stats.norm.cdf(x), 1e-7),
    "tanh": (Activation(torch.tanh), np.tanh, 3e-5),
    "sigmoid": (Activation(torch.sigmoid), lambda x: 1 / (1 + np.exp(-x)), 1e-8),
}


def wide(value):
    return torch.tensor(value, dtype=torch.float64)


def expectation(g, m, s):
    kink = [-m / s] if abs(m / s) < 12 else None
    return integrate.quad(lambda z: g(m + s * z, z) * stats.norm.pdf(z), -12, 12, points=kink, limit=400, epsabs=1e-13)[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("m", "s"), SCALARS)
def test_moments_agree_with_numerical_integration(name, m, s):
    activation, f, tolerance = ACTIVATIONS[name]
    found = activation.moments(wide(m), wide(s * s))
    mean = expectation(lambda x, z: f(x), m, s)
    variance = expectation(lambda x, z: (f(x) - mean) ** 2, m, s)
    slope = expectation(lambda x, z: (f(x) - mean) * z, m, s) / s
    assert found.mean.item() == pytest.approx(mean, abs=tolerance)
    assert found.variance.item() == pytest.approx(variance, abs=max(tolerance * s, 1e-12) * 10)
    assert found.slope.item() == pytest.approx(slope, abs=max(tolerance, 1e-7) * 10)
    assert found.slope.item() ** 2 * s * s <= found.variance.item() * (1 + 1e-12) <= s * s * 1.3


def test_relu_far_from_its_kink_is_the_identity_or_nothing():
    found = rectified(wide([50.0, -50.0, 3.0, -3.0]), wide([1.0, 1.0, 0.0, 0.0]))
    assert found.mean.tolist() == pytest.approx([50, 0, 3, 0], abs=1e-11)
    assert found.variance.tolist() == pytest.approx([1, 0, 0, 0], abs=1e-11)
    assert found.slope.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_stays_between_its_bounds_in_both_precisions(dtype):
    m = torch.linspace(-12, 12, 400, dtype=dtype)
    found = rectified(m, torch.full_like(m, 0.25))
    assert bool((found.variance >= found.slope.square() * 0.25).all())
    assert bool((found.variance <= found.slope * 0.25).all())


def closed_form(m, s, rho):
    a, b = m / s
    q = np.sqrt(1 - rho * rho)
    both = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([a, b])
    pdf, cdf = stats.norm.pdf, stats.norm.cdf
    product = (m[0] * m[1] + rho * s[0] * s[1]) * both
    product += m[1] * s[0] * pdf(a) * cdf((b - rho * a) / q) + m[0] * s[1] * pdf(b) * cdf((a - rho * b) / q)
    product += s[0] * s[1] * q / (2 * np.pi) * np.exp(-(a * a - 2 * rho * a * b + b * b) / (2 * q * q))
    return product - np.prod(m * cdf(m / s) + s * pdf(m / s))


def random_pairs(count):
    rng = np.random.default_rng(0)
    for position in range(count):
        rho = rng.uniform(-1, 1) if position % 4 else np.sign(rng.normal()) * 0.99
        yield rng.normal(size=2) * 1.5, np.exp(rng.normal(size=2) * 0.7), rho


def test_rectified_covariance_agrees_with_the_bivariate_closed_form():
    for m, s, rho in random_pairs(60):
        table = np.array([[s[0] ** 2, rho * s[0] * s[1]], [rho * s[0] * s[1], s[1] ** 2]])
        found = rectified_covariance(wide(m), wide(table))[0, 1].item()
        assert found == pytest.approx(closed_form(m, s, rho), abs=2e-7 * s[0] * s[1])


@pytest.mark.parametrize("name", ["leaky", "gelu", "tanh", "sigmoid"])
def test_covariances_of_activations_agree_with_two_dimensional_quadrature(name):
    activation, f, _ = ACTIVATIONS[name]
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    for m, s, rho in random_pairs(8):
        s = np.minimum(s, 1.2)
        rho = 0.8 * rho
        x = m[0] + s[0] * nodes[:, None]
        y = m[1] + s[1] * (rho * nodes[:, None] + np.sqrt(1 - rho**2) * nodes[None])
        joint = weights[:, None] * weights[None]
        expected = (f(x) * f(y) * joint).sum() - (f(x) * joint).sum() * (f(y) * joint).sum()
        table = np.array([[s[0] ** 2, rho * s[0] * s[1]], [rho * s[0] * s[1], s[1] ** 2]])
        found = activation.covariance(wide(m), wide(table))[0, 1].item()
        assert found == pytest.approx(expected, abs=2e-3 if name == "leaky" else 2e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_covariances_stay_positive_semi_definite_and_symmetric(name):
    activation = ACTIVATIONS[name][0]
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 20, 4, generator=generator, dtype=torch.float64)  # rank 4 in 20 dimensions: singular
    table = root @ root.transpose(1, 2)
    mean = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    for found in (activation.covariance(mean, table), activation.first_order(mean, table)[1]):
        assert torch.allclose(found, found.transpose(1, 2), atol=1e-12)
        assert torch.linalg.eigvalsh(found).min() > -1e-6 * found.abs().max()


def test_larger_of_two_against_sampling():
    rng = np.random.default_rng(3)
    for mean, table in (([0.3, 0.0], [[1.0, 0.6], [0.6, 2.0]]), ([-1.0, 0.5], [[0.5, -0.3], [-0.3, 1.0]])):
        x = rng.multivariate_normal(mean, table, size=400_000)
        m, t = wide(mean), wide(table)
        found = larger(m[0], t[0, 0], m[1], t[1, 1], t[0, 1])
        top = x.max(1)
        assert found.mean.item() == pytest.approx(top.mean(), abs=6e-3)
        assert found.variance.item() == pytest.approx(top.var(), abs=8e-3)
        assert found.first.item() == pytest.approx((x[:, 0] > x[:, 1]).mean(), abs=4e-3)
        covariance = found.first * t[0, 0] + (1 - found.first) * t[0, 1]
        assert covariance.item() == pytest.approx(np.cov(top, x[:, 0])[0, 1], abs=1e-2)


def test_larger_of_equal_variables_is_that_variable():
    found = larger(wide(0.5), wide(2.0), wide(0.5), wide(2.0), wide(2.0))
    assert (found.mean.item(), found.variance.item()) == (pytest.approx(0.5), pytest.approx(2.0))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_finite_where_there_is_no_noise(name):
    activation = ACTIVATIONS[name][0]
    mean = wide([0.0, -1.0, 2.0, 0.0]).requires_grad_()
    table = torch.diag(wide([0.0, 1e-12, 1e-6, 1.0])).requires_grad_()
    (activation.covariance(mean, table).sum() + sum(part.sum() for part in activation.moments(mean, table.diagonal()))).backward()
    assert bool(mean.grad.isfinite().all())
    assert bool(table.grad.isfinite().all())
