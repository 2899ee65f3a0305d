"""The channel representation: exact where its assumptions hold, and what its inflation does and does not bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rsplugins.errors import ParameterError
from rsplugins.moments import Channel, Full, MomentNetwork

SIGMA = 0.3


class Kept:
    """A representation that lets a test look at the last node."""

    def __init__(self, inner):
        self.inner = inner

    def start(self, *arguments):
        self.inner.start(*arguments)

    def step(self, name, *arguments):
        self.inner.step(name, *arguments)

    def output(self, name):
        self.covariance = self.inner.covariance(name, name)
        return torch.zeros(1, 2), torch.zeros(1, 2, 2)


def covariances(network, size, representation, sigma=SIGMA):
    kept = Kept(representation)
    x = torch.rand(1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        MomentNetwork(network.double().eval(), x).propagate(x, sigma, kept)
    return kept.covariance[0]


def block(full, channels, side, row, column):
    """Covariance over the channels at one position, out of a full covariance."""
    places = torch.arange(channels) * side * side + row * side + column
    return full[places][:, places]


@pytest.mark.parametrize("inflation", [0.0, 0.1, "sound"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_first_convolution_is_exact_in_the_interior_and_too_large_at_the_border(groups, inflation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups))
    full = covariances(network, (4, 6, 6), Full())
    channel = covariances(network, (4, 6, 6), Channel(inflation))
    assert torch.allclose(channel, block(full, 6, 6, 2, 3), rtol=1e-10)
    excess = channel - block(full, 6, 6, 0, 0)
    assert torch.linalg.eigvalsh(excess).min() > -1e-12
    assert (block(full, 6, 6, 0, 0).diagonal() / channel.diagonal()).max() < 0.9


def test_the_sound_factor_bounds_a_second_convolution_and_ten_per_cent_does_not():
    first, second = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)
    nn.init.constant_(first.weight, 1 / 9)  # a blur: its outputs are strongly correlated between positions
    nn.init.constant_(second.weight, 1 / 9)
    network = nn.Sequential(first, second)
    true = block(covariances(network, (2, 7, 7), Full()), 2, 7, 3, 3)
    sound = covariances(network, (2, 7, 7), Channel("sound"))
    published = covariances(network, (2, 7, 7), Channel(0.1))
    assert torch.linalg.eigvalsh(sound - true).min() > -1e-12
    assert (true.diagonal() / published.diagonal()).min() > 2


def test_pooling_independent_positions_divides_by_their_number():
    network = nn.Sequential(nn.AvgPool2d(2))
    assert torch.allclose(covariances(network, (3, 4, 4), Channel()), torch.eye(3, dtype=torch.float64) * SIGMA**2 / 4)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert torch.allclose(covariances(network, (3, 4, 4), Channel()), torch.eye(3, dtype=torch.float64) * SIGMA**2 / 16)


def test_a_dense_layer_on_noise_is_exact_through_flattening():
    torch.manual_seed(1)
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3))
    expected = covariances(network, (2, 4, 4), Full())
    assert torch.allclose(covariances(network, (2, 4, 4), Channel()), expected, rtol=1e-9)


def test_a_residual_keeps_the_cross_covariance_at_one_position():
    class Twice(nn.Module):
        def forward(self, x):
            return x + 2.0 * x

    found = covariances(Twice(), (2, 3, 3), Channel())
    assert torch.allclose(found, 9 * SIGMA**2 * torch.eye(2, dtype=torch.float64))
    published = covariances(Twice(), (2, 3, 3), Channel(0.1, published=True))
    assert torch.allclose(published, 5 * SIGMA**2 * torch.eye(2, dtype=torch.float64))


def test_the_published_rule_adds_a_tenth_whatever_the_scale():
    found = covariances(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), (1, 2, 2), Channel(0.1, published=True), sigma=0.01
    )
    assert found.diagonal().min() > 0.1


def test_covariances_stay_positive_semi_definite_through_residual_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = torch.relu(self.a(x))
            y = torch.relu(y - 2 * self.b(y))
            return torch.cat([y, self.c(y)], 1)

    torch.manual_seed(3)
    found = covariances(Block(), (4, 5, 5), Channel())
    assert torch.linalg.eigvalsh(found).min() > -1e-12 * found.abs().max()


def test_max_pooling_of_noise_matches_the_full_representation():
    network = nn.Sequential(nn.MaxPool2d(2, padding=1, stride=2))
    full = covariances(network, (2, 4, 4), Full(), sigma=5.0)
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sampled = network(x + 5.0 * torch.randn(200_000, 2, 4, 4, dtype=torch.float64)).flatten(1)
    assert torch.allclose(full.diagonal(), sampled.var(0), rtol=0.08)  # Clark's closure, four values at a time
    channel = covariances(network, (2, 4, 4), Channel(), sigma=5.0)
    assert torch.allclose(channel.diagonal(), full.diagonal().view(2, -1).mean(1), rtol=1e-9)


def test_mixing_positions_with_channels_is_refused_with_a_way_out():
    class Mixed(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 4, 2, 4).relu().flatten(1)

    with pytest.raises(ParameterError, match="low-rank"):
        covariances(Mixed(), (2, 4, 4), Channel())
