from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import nn

from rsplugins.moments import Channel, MomentNetwork, Pairs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")


def conv_net(*hidden: int) -> nn.Sequential:
    torch.manual_seed(1)
    sizes = [6 * 16, *hidden, 5]
    tail = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.ReLU(), nn.Linear(i, o))]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Flatten(), *tail[1:]
    ).double()


def propagated(model, images, representation):
    name = MomentNetwork(model, images[:1]).walk(images, 0.4, representation)
    return name, representation.mean[name]


@pytest.mark.parametrize("model", [conv_net(), nn.Sequential(nn.Flatten(), nn.Linear(128, 5)).double()])
def test_without_hidden_linear_layers_it_is_channel(model):
    images, classes = torch.rand(3, 2, 8, 8).double(), torch.tensor([[0, 3], [4, 1], [2, 3]])
    name, mean = propagated(model, images, pairs := Pairs(0.1))
    same, expected = propagated(model, images, channel := Channel(0.1))
    torch.testing.assert_close(mean, expected)
    whole = channel.output(same)[1]
    for i, rows in enumerate(classes.tolist()):
        torch.testing.assert_close(pairs.pair(name, classes)[i], whole[i][rows][:, rows])
    torch.testing.assert_close(pairs.output(name)[1], whole)


def test_hidden_linear_layers_are_taken_to_first_order():
    """Against the covariance written out: D S D with the exact variances, by matrices alone."""
    model, images = conv_net(7, 6), torch.rand(3, 2, 8, 8).double()
    name, mean = propagated(model, images, pairs := Pairs())
    # Up to the first hidden linear layer the representation `channel` is exact about what it writes out.
    base, sources = propagated(model[:6], images, channel := Channel())
    covariance = channel.output(base)[1]
    for linear in (model[7], model[9]):
        s = covariance.diagonal(dim1=1, dim2=2).sqrt()
        normal = torch.distributions.Normal(0.0, 1.0)
        slope, density = normal.cdf(sources / s), normal.log_prob(sources / s).exp()
        average = sources * slope + s * density
        variance = (sources**2 + s**2) * slope + sources * s * density - average**2
        covariance = covariance * slope[:, :, None] * slope[:, None, :]
        covariance = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2)) + torch.diag_embed(variance)
        sources, covariance = linear(average), linear.weight @ covariance @ linear.weight.T
    torch.testing.assert_close(mean, sources)
    classes = mean.topk(2).indices
    for i, rows in enumerate(classes.tolist()):
        torch.testing.assert_close(pairs.pair(name, classes)[i], covariance[i][rows][:, rows])


def test_a_second_reader_makes_it_write_the_covariance_out():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.first(x.flatten(1))
            return self.last(y + self.inner(y))

    model, images = Residual().double(), torch.rand(2, 1, 2, 2).double()
    name, mean = propagated(model, images, pairs := Pairs())
    jacobian = model.last.weight @ (torch.eye(6).double() + model.inner.weight) @ model.first.weight
    torch.testing.assert_close(mean, model(images))
    expected = 0.4**2 * jacobian @ jacobian.T
    torch.testing.assert_close(pairs.output(name)[1][0], expected)


def test_gradients_agree_with_differences():
    model, images = conv_net(7), torch.rand(2, 2, 8, 8).double()
    network, weight = MomentNetwork(model, images[:1]), model[2].weight

    def value() -> torch.Tensor:
        pairs = Pairs()
        name = network.walk(images, 0.4, pairs)
        return pairs.pair(name, torch.tensor([[0, 1], [2, 4]])).square().sum() + pairs.mean[name].square().sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    for position in [(0, 0, 0, 0), (3, 1, 2, 2), (5, 3, 1, 3)]:
        with torch.no_grad():
            weight[position] += 1e-6
            high = value()
            weight[position] -= 2e-6
            low = value()
            weight[position] += 1e-6
        assert float(gradient[position]) == pytest.approx(float(high - low) / 2e-6, rel=1e-4)
