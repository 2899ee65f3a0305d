"""Activations against a dense grid of slopes, pooling and resizing against the SVD of the materialised operator."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rsplugins.lipschitz import activations, pooling


@pytest.mark.parametrize("name", sorted(activations.SLOPES))
def test_slope_is_above_every_secant_and_tight(name):
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    function = getattr(F, name, None) or getattr(torch, name)
    y = function(x, -1.0, 1.0) if name == "clamp" else function(x)
    steepest = ((y[1:] - y[:-1]).abs() / (x[1:] - x[:-1])).max().item()
    slope = activations.SLOPES[name]()
    assert steepest <= slope * (1 + 1e-9)
    assert steepest >= slope * 0.9995


@pytest.mark.parametrize(
    ("module", "slope"),
    [
        (nn.LeakyReLU(0.2), 1.0),
        (nn.LeakyReLU(3.0), 3.0),
        (nn.ELU(2.0), 2.0),
        (nn.CELU(0.1), 1.0),
        (nn.CELU(-0.2), None),
        (nn.GELU(approximate="tanh"), activations.GELU_TANH),
        (nn.Softplus(beta=2.0), 1.0),
        (nn.Softplus(beta=0.5), 1.0),
        (nn.Softplus(threshold=1.0), None),
        (nn.Softplus(beta=-1.0), None),
        (nn.Softplus(beta=1e-3), None),
        (nn.Softplus(beta=1e-7, threshold=17.0), None),
        (nn.Softplus(beta=0.0, threshold=50.0), None),
    ],
    ids=str,
)
def test_slope_from_the_module_settings(module, slope):
    name = activations.MODULES[type(module)]
    assert activations.SLOPES[name](**{key: getattr(module, key) for key in activations.OPTIONS.get(name, ())}) == slope
    if slope is not None:
        x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
        assert (module(x).diff().abs() / x.diff()).max().item() <= slope * (1 + 1e-9)


def test_celu_with_a_negative_alpha_is_as_steep_as_one_likes():
    x = torch.linspace(-6, 0, 100_001, dtype=torch.float64)
    assert (F.celu(x, -0.2).diff().abs() / x.diff()).max().item() > 1e6


@pytest.mark.parametrize("beta", [1e-7, 1e-3, 0.03, 0.1, 0.5, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("threshold", [1.0, 5.0, 17.0, 20.0, 40.0])
def test_softplus_where_it_goes_over_to_its_argument(beta, threshold):
    slope = activations.SLOPES["softplus"](beta=beta, threshold=threshold)
    for step in (1e-2, 1e-3, 1e-5):
        x = threshold / beta + torch.arange(-500, 500, dtype=torch.float64) * step
        gap = F.softplus(x, beta, threshold).diff().abs().max().item()
        # Two values lie no further apart than their arguments, or than the jump that is allowed.
        assert slope is None or gap <= max(slope * step, activations.SOFTPLUS_JUMP) * (1 + 1e-6)


@pytest.mark.parametrize(("beta", "threshold"), [(1e-3, 17.0), (0.03, 17.0), (1.0, 5.0), (1e-7, 17.0)])
def test_softplus_settings_that_jump_do_so(beta, threshold):
    x = threshold / beta + torch.arange(-500, 500, dtype=torch.float64) * 1e-9 / beta
    assert F.softplus(x, beta, threshold).diff().min().item() < -activations.SOFTPLUS_JUMP
    assert activations.SLOPES["softplus"](beta=beta, threshold=threshold) is None


def test_tanh_gelu_by_grid():
    x = torch.linspace(-6, 6, 2_000_001, dtype=torch.float64)
    steepest = (F.gelu(x, approximate="tanh").diff().abs() / x.diff()).max().item()
    assert activations.GELU_TANH - 2e-4 < steepest < activations.GELU_TANH


@pytest.mark.parametrize(
    "settings", [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 3, 0, 1), (5, 2, 2, 1), (3, 1, 0, 2), (2, 3, 0, 1)]
)
def test_max_pool_factor_is_reached_and_never_exceeded(settings):
    k, s, p, d = settings
    n = 9
    out = F.max_pool2d(torch.zeros(1, 1, n, n), k, s, p, d).shape[-1]
    positions = pooling.pooling_positions(n, out, k, s, p, d)
    bound = pooling.max_pool_norm([positions, positions])
    # One bright pixel moves by a unit in every window that sees it.
    units = torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n) + 1.0
    moved = (F.max_pool2d(units, k, s, p, d) - 1.0).flatten(1).norm(dim=1).max().item()
    assert math.isclose(moved, bound, rel_tol=1e-12)
    torch.manual_seed(0)
    x, y = torch.randn(2, 200, 1, n, n, dtype=torch.float64)
    stretch = (F.max_pool2d(x, k, s, p, d) - F.max_pool2d(y, k, s, p, d)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert stretch.max().item() <= bound


def svd_of(function, n):
    units = torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n)
    return torch.linalg.svdvals(function(units).flatten(1)).max().item()


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize("settings", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 3, 2), (7, 7, 0)])
def test_average_pool_is_the_product_of_two_small_matrices(settings, ceil, include):
    k, s, p = settings
    n = 8
    pool = nn.AvgPool2d(k, s, p, ceil_mode=ceil, count_include_pad=include)
    out = pool(torch.zeros(1, 1, n, n)).shape[-1]
    divisors = pooling.average_divisors(n, out, k, s, p, include)
    matrix = pooling.average_matrix(n, pooling.pooling_positions(n, out, k, s, p), divisors)
    truth = svd_of(pool, n)
    assert truth * (1 - 1e-12) <= pooling.kronecker_norm([matrix, matrix]) <= truth * 1.001


@pytest.mark.parametrize("out", [1, 2, 3, 5, 8, 11])
def test_adaptive_average_pool(out):
    positions = pooling.adaptive_positions(8, out)
    matrix = pooling.average_matrix(8, positions, [len(window) for window in positions])
    truth = svd_of(nn.AdaptiveAvgPool2d(out), 8)
    assert truth * (1 - 1e-12) <= pooling.kronecker_norm([matrix, matrix]) <= truth * 1.001


@pytest.mark.parametrize("out", [5, 8, 16, 20])
@pytest.mark.parametrize(
    ("two", "one", "flag"), [("bilinear", "linear", False), ("bilinear", "linear", True), ("nearest", "nearest", None)]
)
def test_resizing(two, one, flag, out):
    matrix = pooling.interpolation_matrix(8, out, one, flag, None)
    truth = svd_of(lambda units: F.interpolate(units, size=out, mode=two, align_corners=flag), 8)
    assert truth * (1 - 1e-12) <= pooling.kronecker_norm([matrix, matrix]) <= truth * 1.001


def test_the_identity_costs_nothing():
    assert pooling.kronecker_norm([torch.eye(7, dtype=torch.float64)]) == 1.0
