"""The low-rank representation: equal to first-order full covariances at full rank, and within its stated error below."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rsplugins.moments import Full, LowRank, MomentNetwork
from rsplugins.moments.low_rank import directions
from tests.moments.moment_nets import NETWORKS, SIZE, make


def both(network, x, sigma, rank):
    with torch.no_grad():
        walk = MomentNetwork(network, x[:1])
        return walk.propagate(x, sigma, Full("first-order")), walk.propagate(x, sigma, LowRank(rank))


def test_one_hidden_layer_at_full_rank_is_the_first_order_rule():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    full, low = both(network, torch.rand(3, 10, dtype=torch.float64), 0.4, 10)
    assert torch.allclose(low.mean, full.mean)
    assert torch.allclose(low.covariance, full.covariance)


def test_variances_after_the_first_layer_are_exact_at_any_rank():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).double()
    full, low = both(network, torch.rand(2, *SIZE, dtype=torch.float64), 0.4, 3)
    assert torch.allclose(low.mean, full.mean)
    assert torch.allclose(low.covariance, full.covariance)


@pytest.mark.parametrize(("rank", "tolerance"), [(72, 0.02), (24, 0.08)])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "pool"])
def test_deeper_networks_stay_near_the_first_order_rule(name, rank, tolerance):
    x = torch.rand(2, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    full, low = both(make(NETWORKS, name), x, 0.2, rank)
    spread = full.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert ((low.mean - full.mean) / spread).abs().max() < 2 * tolerance
    assert (low.covariance.diagonal(dim1=1, dim2=2).sqrt() / spread - 1).abs().max() < tolerance


def test_max_pooling_keeps_its_place_in_the_adjoint():
    x = torch.rand(2, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    full, low = both(make(NETWORKS, "pool"), x, 0.2, 72)
    assert torch.allclose(low.covariance, full.covariance, rtol=0.1, atol=0.02 * full.covariance.abs().max().item())


def test_directions_are_orthonormal_and_fixed():
    found = directions(8, 50, 0)
    assert torch.allclose(found @ found.T, torch.eye(8, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, directions(8, 50, 0))
    assert not torch.allclose(found, directions(8, 50, 1))


def test_the_same_input_gives_the_same_estimate_with_and_without_gradients():
    network, x = make(NETWORKS, "residual"), torch.rand(1, *SIZE, dtype=torch.float64)
    walk = MomentNetwork(network, x)
    with_gradients = walk.propagate(x, 0.2, LowRank(8))
    with torch.no_grad():
        without = walk.propagate(x, 0.2, LowRank(8))
    assert torch.allclose(with_gradients.covariance, without.covariance)
    assert with_gradients.covariance.requires_grad
    assert not without.covariance.requires_grad
