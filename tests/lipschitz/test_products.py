"""Products of two values of the image: against searches for stretched pairs and brute force, and the set that they hold on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.lipschitz import analyse, lipschitz_bound, products
from rsplugins.lipschitz.local import local_constants, run_recording

SIZE = (3, 4, 4)
DIAGONAL = math.sqrt(48)


class Gated(nn.Module):
    """Squeeze-and-excitation: features times a gate by channel."""

    def __init__(self, gate=torch.sigmoid, scale=1.0):
        super().__init__()
        self.features, self.squeeze, self.gate = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1), gate
        self.head = nn.Linear(20, 3)
        with torch.no_grad():
            self.features.weight.mul_(scale)

    def forward(self, x):
        y = self.features(x)
        return self.head((y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True)))).flatten(1))


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        y = x.flatten(1)
        return self.head(y * y)


class InPlace(Gated):
    def forward(self, x):
        y = self.features(x)
        gate = self.gate(self.squeeze(y.mean((2, 3), keepdim=True))).expand_as(y)
        y = y * 1.0
        y *= gate
        return self.head(y.flatten(1))


class Outer(nn.Module):
    """Both factors are broadcast."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Conv2d(3, 3, 1), nn.Linear(48, 3)

    def forward(self, x):
        y = self.rows(x)
        return self.head((y.mean(2, keepdim=True) * y.mean(3, keepdim=True)).flatten(1))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(48, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        y = self.norm(x)
        return self.head((y * torch.tanh(y.mean((2, 3), keepdim=True))).flatten(1))


NETWORKS = {
    "sigmoid": Gated,
    "identity": lambda: Gated(nn.Identity()),
    "relu": lambda: Gated(torch.relu),
    "square": Square,
    "in place": InPlace,
    "outer": Outer,
    "normalised": Normalised,
}


def model(name, seed=0):
    torch.manual_seed(seed)
    return rsplugins.wrap(NETWORKS[name](), input_size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.3))


def stretch(function, start, others, steps=150):
    """The steepest slope that gradient ascent finds between images of a set: a ball around each start."""
    x = start.clone().double().requires_grad_()
    y = others.clone().double().requires_grad_()
    optimizer = torch.optim.Adam([x, y], lr=0.05)
    best = 0.0
    for _ in range(steps):
        gap = (function(x) - function(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1).clamp_min(1e-6)
        best = max(best, float(gap.max()))
        optimizer.zero_grad()
        (-gap.sum()).backward()
        optimizer.step()
        with torch.no_grad():  # within the diagonal of an image: here of the image of zeros or of ones
            for each, centre in ((x, start.round()), (y, start.round())):
                away = each - centre
                each.copy_(centre + away * (DIAGONAL / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp_max(1.0))
    return best


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_no_pair_of_the_set_is_stretched_further(name, seed):
    classifier = model(name, seed)
    bound = lipschitz_bound(classifier)
    double = classifier.double()
    corners = torch.rand(8, 1, 1, 1).round().expand(8, *SIZE)
    start = corners + 0.01 * torch.randn(8, *SIZE)
    reached = stretch(double, start, start + 0.5 * torch.randn(8, *SIZE))
    assert 0 < reached <= bound


def test_factors_are_those_of_brute_force():
    torch.manual_seed(0)
    for shapes in (((1, 3, 4, 4), (1, 3, 1, 1)), ((1, 3, 1, 4), (1, 3, 4, 1)), ((1, 3, 4, 4), (1, 3, 4, 4)), ((1, 5), (1, 5))):
        first, second = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        for value, other, found in ((first, second, 0), (second, first, 1)):
            factor = products.factors(first, second)[found]
            whole = torch.broadcast_shapes(*shapes)
            numbers = torch.arange(other.numel()).reshape(other.shape).expand(whole)
            full = value.expand(whole)
            met = [float(full[numbers == j].norm()) for j in range(other.numel())]
            assert factor.grey == pytest.approx(max(met))
            assert factor.total == pytest.approx(float(full.norm()))
            assert factor.most == int((numbers == 0).sum())
            times = torch.arange(value.numel()).reshape(value.shape).expand(whole).flatten().bincount()
            assert factor.stretch == pytest.approx(math.sqrt(int(times.max())))


def test_the_bound_of_a_square_is_what_it_is_at_the_end_of_the_set():
    classifier = rsplugins.wrap(Square(), input_size=SIZE)
    weight = float(torch.linalg.svdvals(classifier.module.head.weight.double())[0])
    # 2 max|x| with |x| at most .5 + 1.5 sqrt(48), up to rounding
    assert lipschitz_bound(classifier) == pytest.approx(2 * (0.5 + 1.5 * DIAGONAL) * weight, rel=1e-4)


def test_no_radius_is_claimed_beyond_the_set():
    torch.manual_seed(0)
    network = Gated(scale=1e-9)
    with torch.no_grad():
        network.features.bias.zero_()
        network.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    classifier = rsplugins.wrap(network, input_size=SIZE)
    (found,) = rsplugins.certify(classifier, torch.rand(1, *SIZE), "lipschitz-margin")
    assert 0.99 * DIAGONAL < found.radius <= DIAGONAL
    (found,) = rsplugins.certify(classifier, torch.rand(1, *SIZE), "latent", split="features", sigma=0.25, n0=10, n=100)
    assert found.radius <= DIAGONAL


class Sequence(nn.Sequential):
    """A product before the cut."""


def test_the_latent_before_which_values_are_multiplied_keeps_within_the_set():
    torch.manual_seed(0)
    gated = Gated(scale=1e-9)
    classifier = rsplugins.wrap(Sequence(gated, nn.Linear(3, 3)), input_size=SIZE)
    assert analyse(classifier).reach == pytest.approx(DIAGONAL)
    (found,) = rsplugins.certify(
        classifier, torch.rand(1, *SIZE), "latent", split="0", sigma=0.25, n0=10, n=100, gammas=[1.0, 1e3], margin=True
    )
    assert found.radius <= DIAGONAL
    assert [gamma for gamma, _ in found.evidence["local"]] == [1.0]


def test_local_bounds_hold_around_an_image():
    classifier = model("relu")
    analysis = analyse(classifier)
    x = torch.rand(1, *SIZE)
    node = analysis.traced.output
    _, seen = run_recording(analysis, node, x)
    for gamma, bound in zip((0.1, 1.0), local_constants(analysis, node, seen, (0.1, 1.0)), strict=True):
        points = x + gamma * torch.nn.functional.normalize(torch.randn(400, 48), dim=1).view(400, *SIZE) * torch.rand(
            400, 1, 1, 1
        )
        with torch.no_grad():
            values = classifier(points)
        for i, j in itertools.pairwise(range(400)):
            assert float((values[i] - values[j]).norm()) <= bound * float((points[i] - points[j]).norm()) * (1 + 1e-4)


def test_two_results_of_a_normalisation_are_nearly_as_far_apart_as_its_spread_and_no_further():
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 3, eps=1e-12)
    with torch.no_grad():
        norm.weight.fill_(1.7)
    classifier = rsplugins.wrap(nn.Sequential(norm, nn.Flatten(), nn.Linear(48, 3)), input_size=SIZE)
    analysis = analyse(classifier)
    (spread,) = {value.spread for value in analysis.values.values() if math.isfinite(value.spread)}
    x = torch.rand(1, *SIZE)
    reached = float((norm(x) - norm(1 - x)).norm())  # z and -z
    assert 0.999 * spread < reached <= spread


def test_no_value_gets_further_from_grey_than_is_said():
    for name in NETWORKS:
        classifier = model(name)
        analysis = analyse(classifier)
        directions = torch.nn.functional.normalize(torch.randn(200, 48), dim=1).view(200, *SIZE)
        points = 0.5 + 1.5 * DIAGONAL * directions * torch.rand(200, 1, 1, 1).round()
        with torch.no_grad():
            moved = classifier(points) - classifier(torch.full((1, *SIZE), 0.5))
        said = analysis.evaluation.deviation(analysis.values[analysis.traced.output], 1.5 * DIAGONAL)
        assert float(moved.norm(dim=1).max()) <= said * (1 + 1e-4)


def test_networks_without_products_reach_everywhere():
    torch.manual_seed(0)
    plain = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.SiLU()), input_size=SIZE)
    assert analyse(plain).reach == math.inf
