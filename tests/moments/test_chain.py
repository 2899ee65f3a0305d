from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.moments import Channel, Full, MomentNetwork, Pairs
from rsplugins.moments.chain import MomentChain, propagation

needs_auto_lirpa = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")


def conv_net() -> nn.Sequential:
    """One ReLU in three places, as many write it."""
    torch.manual_seed(1)
    relu = nn.ReLU()
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), relu, nn.Conv2d(4, 6, 4, 2, 1, groups=2), relu)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(96, 7), relu, nn.Identity(), nn.Linear(7, 5)).double()


def normalised() -> Classifier:
    return Classifier(conv_net(), mean=(0.1, 0.3), std=(0.5, 0.2), input_size=(2, 8, 8), num_classes=5).eval()


IMAGES = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("model", [conv_net(), normalised()], ids=["plain", "classifier"])
def test_to_the_first_activation_it_is_exact_and_then_near_sampled_moments(model):
    """Against Monte Carlo through the network itself."""
    sigma = 0.05
    noise = sigma * torch.randn(40_000, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(2)).double()
    found = MomentChain(model).propagate(IMAGES, sigma, Full())
    with torch.no_grad():
        for i, image in enumerate(IMAGES):
            logits = model(image + noise)
            spread = logits.std(0)
            assert (found.mean[i] - logits.mean(0)).abs().lt(0.03 * spread).all()
            torch.testing.assert_close(found.covariance[i].diagonal().sqrt(), spread, rtol=0.05, atol=0)


@needs_auto_lirpa
@pytest.mark.parametrize("representation", [Full, Channel, Pairs])
@pytest.mark.parametrize("model", [conv_net(), normalised()], ids=["plain", "classifier"])
def test_it_is_what_the_graph_of_auto_lirpa_gives(model, representation):
    own = MomentChain(model).propagate(IMAGES, 0.3, representation())
    traced = MomentNetwork(model, IMAGES[:1]).propagate(IMAGES, 0.3, representation())
    torch.testing.assert_close(own.mean, traced.mean)
    torch.testing.assert_close(own.covariance, traced.covariance)


def test_weights_are_read_at_each_propagation_and_get_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    chain, images = MomentChain(model), torch.rand(2, 1, 2, 2)
    with torch.no_grad():
        model[1].weight.mul_(2.0)
    found = chain.propagate(images, 0.5, Full())
    torch.testing.assert_close(found.covariance[1], 0.25 * model[1].weight @ model[1].weight.T)
    found.covariance.sum().backward()
    torch.testing.assert_close(model[1].weight.grad, (2 * 2 * 0.25 * model[1].weight.sum(0)).detach().expand(3, 4))


@needs_auto_lirpa
@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Flatten(2)], ids=["tanh", "flatten"])
def test_what_is_no_chain_goes_through_the_graph(layer):
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2))
    assert isinstance(propagation(model, torch.rand(1, 1, 4, 4)), MomentNetwork)


@needs_auto_lirpa
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(1, 1, 3, padding="same"), nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")],
    ids=["same", "circular"],
)
def test_padding_that_is_not_that_of_the_rule_is_left_to_the_graph_which_refuses_it(layer):
    with pytest.raises(ParameterError):
        propagation(nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2)), torch.rand(1, 1, 4, 4))


def test_a_chain_needs_no_tracer():
    assert isinstance(propagation(normalised(), IMAGES), MomentChain)
