"""The walk over the graph: exact on linear networks, close to sampling on others, and refusals with a cause."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.errors import ParameterError, UsageError
from rsplugins.moments import Channel, Full, LowRank, MomentNetwork
from rsplugins.moments.activations import Activation
from rsplugins.moments.operations import Elementwise
from tests.moments.moment_nets import LINEAR, NETWORKS, SIZE, Identity, make
from tests.moments.tensor_radii import pairwise_radius, union_radius

REPRESENTATIONS = {"full": Full, "first-order": lambda: Full("first-order"), "low-rank": lambda: LowRank(72)}


def images(count, size=SIZE):
    return torch.rand(count, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def propagate(network, x, sigma, representation):
    with torch.no_grad():
        return MomentNetwork(network, x[:1]).propagate(x, sigma, representation)


@pytest.mark.parametrize("representation", [*REPRESENTATIONS, "low-rank of rank 3"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_networks_are_exact(name, representation):
    network, x = make(LINEAR, name), images(2)
    made = LowRank(3) if representation not in REPRESENTATIONS else REPRESENTATIONS[representation]()
    found = propagate(network, x, 0.3, made)
    jacobian = torch.autograd.functional.jacobian(lambda image: network(image)[0], x[:1]).reshape(3, -1)
    assert torch.allclose(found.mean, network(x), atol=1e-10)
    assert torch.allclose(found.covariance, (0.09 * jacobian @ jacobian.T).expand(2, -1, -1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", [1e-3, 0.25, 2.0])
def test_the_radius_of_a_linear_classifier_is_its_distance_to_the_boundary(sigma):
    torch.manual_seed(0)
    layer = nn.Linear(20, 4)
    classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), layer), mean=0.4, std=0.2, input_size=(1, 4, 5), num_classes=4)
    x = torch.rand(8, 1, 4, 5)
    found = propagate(classifier, x, sigma, Full())
    logits, w = classifier(x), layer.weight / 0.2  # noise in raw pixels reaches the layer divided by std
    top = logits.argmax(1)
    distance = [
        min((logits[i, a] - logits[i, k]) / (w[a] - w[k]).norm() for k in range(4) if k != a) for i, a in enumerate(top.tolist())
    ]
    expected = torch.stack(distance).detach()
    assert torch.allclose(pairwise_radius(*found, sigma).float(), expected, atol=1e-5)
    two = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), input_size=(1, 4, 5), num_classes=2)
    logits, w = two(x), two.module[1].weight
    distance = (logits[:, 0] - logits[:, 1]).abs() / (w[0] - w[1]).norm()
    for radius in (pairwise_radius, union_radius):
        if radius is pairwise_radius or sigma > 1e-3:
            found = radius(*propagate(two, x, sigma, Full()), sigma)
            assert torch.allclose(found.float(), distance, atol=1e-5)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_small_noise_agrees_with_sampling(name, representation):
    network, x, sigma = make(NETWORKS, name), images(1), 0.08
    found = propagate(network, x, sigma, REPRESENTATIONS[representation]())
    with torch.no_grad():
        sampled = network(x + sigma * torch.randn(20_000, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    spread = sampled.std(0)
    assert ((found.mean[0] - sampled.mean(0)) / spread).abs().max() < 0.05
    ratio = found.covariance[0] / torch.cov(sampled.T).diagonal().sqrt().outer(spread)
    expected = torch.corrcoef(sampled.T)
    assert (ratio - expected).abs().max() < 0.1
    assert torch.linalg.eigvalsh(found.covariance[0]).min() > -1e-9 * found.covariance.abs().max()


def test_dropping_the_cross_covariance_of_a_residual_is_wrong():
    network, x, sigma = Identity().double(), images(1, (1, 3, 4)), 0.2
    found = propagate(network, x, sigma, Full())
    with torch.no_grad():
        sampled = network(x + sigma * torch.randn(60_000, 1, 3, 4, dtype=torch.float64))
    ratio = found.covariance[0].diagonal().sqrt() / sampled.std(0)
    assert ((ratio - 1).abs() < 0.02).all()

    class Forgetful(Full):
        def covariance(self, a, b):
            return super().covariance(a, b) * (1.0 if a == b else 0.0)

    dropped = propagate(network, x, sigma, Forgetful()).covariance[0].diagonal().sqrt() / sampled.std(0)
    assert (dropped - 1).abs().max() > 0.05


def test_every_covariance_on_the_way_is_symmetric_and_positive_semi_definite():
    seen = []

    class Watched(Full):
        def step(self, name, *arguments):
            super().step(name, *arguments)
            seen.append(self.covariance(name, name))

    for name in NETWORKS:
        propagate(make(NETWORKS, name), images(2), 0.5, Watched())
    assert len(seen) > 30
    for covariance in seen:
        assert torch.equal(covariance, covariance.transpose(1, 2))
        assert torch.linalg.eigvalsh(covariance).min() >= -1e-7 * covariance.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("representation", [*REPRESENTATIONS, "channel"])
def test_inputs_of_a_batch_do_not_see_each_other(representation, batch):
    network, x = make(NETWORKS, "residual"), images(3)
    make_one = REPRESENTATIONS.get(representation, Channel)
    together = propagate(network, x, 0.2, make_one())
    alone = propagate(network, x[1 : 1 + batch], 0.2, make_one())
    assert torch.allclose(alone.mean[0], together.mean[1])
    assert torch.allclose(alone.covariance[0], together.covariance[1])


@pytest.mark.parametrize("sigma", [0.0, -0.25, float("nan"), float("inf")])
def test_sigma_must_be_positive(sigma):
    network = MomentNetwork(nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(ParameterError, match="sigma"):
        network.propagate(torch.rand(1, 3), sigma, Full())


def test_batch_normalisation_in_training_mode_is_refused():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)).train()
    with pytest.raises(UsageError, match=r"1 \(BatchNorm2d\) is in training mode"):
        MomentNetwork(network, torch.rand(1, *SIZE))


@pytest.mark.parametrize(("layer", "text"), [(nn.Softplus(), "Softplus"), (nn.Softmax(1), "softmax")])
def test_a_layer_without_a_rule_is_named(layer, text):
    network = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), layer, nn.Linear(4, 2))
    with pytest.raises(ParameterError, match=text):
        MomentNetwork(network, torch.rand(1, *SIZE))


def test_a_rule_can_be_added():
    network = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Softplus(), nn.Linear(4, 2)).double()
    x = images(1)
    rules = {"BoundSoftplus": lambda site: Elementwise(Activation(nn.functional.softplus))}
    with torch.no_grad():
        found = MomentNetwork(network, x, rules=rules).propagate(x, 0.2, Full())
        sampled = network(x + 0.2 * torch.randn(40_000, *SIZE, dtype=torch.float64))
    assert torch.allclose(found.covariance[0].diagonal().sqrt(), sampled.std(0), rtol=0.03)


@pytest.mark.parametrize("sigma", [1e-3, 0.5])
@pytest.mark.parametrize("representation", ["full", "low-rank", "channel"])
def test_gradients_reach_weights_and_are_finite(representation, sigma):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    made = {"full": Full, "low-rank": lambda: LowRank(8), "channel": Channel}[representation]()
    found = MomentNetwork(network, torch.rand(1, *SIZE)).propagate(torch.rand(4, *SIZE), sigma, made)
    (pairwise_radius(*found, sigma).sum() + union_radius(*found, sigma).sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert network[0].weight.grad.abs().max() > 0


def test_the_gradient_is_that_of_the_radius():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(1, 6, dtype=torch.float64)
    moments = MomentNetwork(network, x)

    def radius():
        return union_radius(*moments.propagate(x, 0.3, Full()), 0.3, torch.tensor([0])).sum()

    value = radius()
    (gradient,) = torch.autograd.grad(value, network[0].weight)
    step = 1e-6
    with torch.no_grad():
        network[0].weight[2, 3] += step
        above = radius()
        network[0].weight[2, 3] -= 2 * step
        below = radius()
    assert gradient[2, 3].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-4, abs=1e-9)
