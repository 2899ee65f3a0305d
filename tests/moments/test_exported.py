"""The walk over torch.export's graph against sampling, closed forms and autograd's Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rsplugins
from rsplugins.moments import exported
from rsplugins.moments.activations import Clip
from rsplugins.moments.exported import ExportedNetwork

DRAWS = 200_000


class Gate(nn.Module):
    """Squeeze and excitation: a product of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = h * F.hardsigmoid(self.gate(h.mean((2, 3), keepdim=True)))
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits


class Mixer(nn.Module):
    """Token mixing: a transpose, a linear layer over positions, and padding by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels, self.head = nn.Linear(20, 6), nn.Linear(2, 5), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x, (0, 1, 0, 0)).flatten(2)
        h = F.silu(self.channels(self.tokens(h).transpose(1, 2)))
        logits: Tensor = self.head(h.flatten(1))
        return logits


class Attention(nn.Module):
    """A block with a class token, LayerNorm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(1).view(len(x), 4, 8)], 1)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        logits: Tensor = self.head(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return logits


def stack(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), activation, nn.Flatten(), nn.Linear(24, 3))


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.MaxPool2d(2), nn.ReLU6(), nn.Flatten(), nn.Linear(24, 3))


MODELS = {
    "relu6": lambda: stack(nn.ReLU6()),
    "hardtanh": lambda: stack(nn.Hardtanh(-0.3, 0.4)),
    "hardswish": lambda: stack(nn.Hardswish()),
    "hardsigmoid": lambda: stack(nn.Hardsigmoid()),
    "silu": lambda: stack(nn.SiLU()),
    "gelu": lambda: stack(nn.GELU()),
    "leaky": lambda: stack(nn.LeakyReLU(0.2)),
    "max pooling": pooled,
    "product of branches": Gate,
    "token mixing": Mixer,
}


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_samples(name: str) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().eval().double()
    x, sigma = torch.rand(1, 2, 4, 4, dtype=torch.float64), 0.3
    network = ExportedNetwork(model, x)
    found = network.propagate(x, sigma)
    with torch.no_grad():
        sample = model(x + sigma * torch.randn(DRAWS, *x.shape[1:], dtype=torch.float64))
    deviation = sample.std(0)
    assert network.linearised == []
    assert ((found.mean[0] - sample.mean(0)).abs() < 0.05 * deviation + 4 * deviation / math.sqrt(DRAWS)).all()
    assert (found.covariance[0].diagonal().sqrt() / deviation - 1).abs().max() < 0.06
    correlation, expected = _correlation(found.covariance[0]), _correlation(torch.cov(sample.t()))
    assert (correlation - expected).abs().max() < 0.05


def _correlation(table: Tensor) -> Tensor:
    deviation = table.diagonal().sqrt()
    return table / torch.outer(deviation, deviation)


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.5), (0.2, math.inf), (-0.01, 0.01)])
def test_moments_of_a_clip_are_those_of_a_fine_grid(low: float, high: float) -> None:
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    weight /= weight.sum()
    for mean in (-9.0, -1.0, 0.0, 0.3, 5.9, 30.0):
        for deviation in (1e-3, 0.1, 1.0, 4.0):
            values = (mean + deviation * grid).clamp(low, high)
            average = (values * weight).sum()
            spread = ((values - average).square() * weight).sum()
            slope = (values * weight * grid).sum() / deviation
            found = Clip(low, high).moments(*(torch.tensor(v, dtype=torch.float64) for v in (mean, deviation**2)))
            assert float(found.mean) == pytest.approx(float(average), abs=1e-7 * max(1, abs(mean)))
            assert float(found.variance) == pytest.approx(float(spread), rel=1e-4, abs=1e-10)
            assert float(found.slope) == pytest.approx(float(slope), abs=2e-4)


def test_an_operator_without_a_rule_is_linearised_and_named() -> None:
    torch.manual_seed(0)
    model, x, sigma = Attention().eval().double(), torch.rand(1, 2, 4, 4, dtype=torch.float64), 1e-3
    network = ExportedNetwork(model, x)
    found = network.propagate(x, sigma)
    jacobian = torch.autograd.functional.jacobian(lambda image: model(image)[0], x).flatten(1)  # type: ignore[no-untyped-call]
    assert torch.allclose(found.covariance[0], sigma**2 * jacobian @ jacobian.t(), rtol=1e-6, atol=1e-14)
    assert network.linearised == ["layer_norm", "scaled_dot_product_attention"]


def test_what_cannot_be_exported_is_linearised_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "exported", lambda *_: None)
    torch.manual_seed(0)
    model, x = Attention().eval().double(), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    network = ExportedNetwork(model, x)
    found = network.propagate(x, 0.1)
    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda image: model(image)[0], x[row : row + 1]).flatten(1)  # type: ignore[no-untyped-call]
        assert torch.allclose(found.covariance[row], 0.01 * jacobian @ jacobian.t(), rtol=1e-6, atol=1e-14)
    assert network.linearised == ["the whole network"]


def test_the_certificate_says_what_was_linearised() -> None:
    torch.manual_seed(0)
    classifier = rsplugins.wrap(Attention().eval(), input_size=(2, 4, 4))
    (found,) = rsplugins.certify(classifier, torch.rand(1, 2, 4, 4), "covariance", sigma=0.1, progress=False)
    assert str(found.guarantee) == "estimate"
    assert any("layer_norm, scaled_dot_product_attention" in said for said in found.assumptions)
    (guided,) = rsplugins.certify(
        classifier, torch.rand(1, 2, 4, 4), "covariance-guided", sigma=0.1, n=200, n_min=100, progress=False
    )
    assert str(guided.guarantee) == "probabilistic"


def test_many_classes_keep_the_covariance_of_the_largest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 50)).double()
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    found = ExportedNetwork(model, x, rank=8).propagate(x, 0.2)
    exact = 0.04 * model[1].weight @ model[1].weight.t()
    kept = found.mean[0].argsort(descending=True)[: exported.KEPT]
    assert torch.allclose(found.covariance[0][kept][:, kept], exact[kept][:, kept], rtol=1e-9)
    assert (found.covariance[0].diagonal() > 0).all()
