"""Cuts reproduce the whole; cuts that cannot be are refused with the reason."""

import pytest
import timm
import torch
from torch import nn

import rsplugins
from rsplugins.errors import UnknownNameError, UsageError
from rsplugins.lipschitz import analyse, split_at
from rsplugins.lipschitz.split import cut


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.outer, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.act = nn.ReLU()
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(self.stem(x.flatten(1)))
        x = x + self.outer(self.act(self.inner(x)))
        return self.head(x)


@pytest.fixture
def classifier():
    return rsplugins.wrap(Residual(), mean=0.3, std=0.5, input_size=(1, 2, 2))


@pytest.mark.parametrize("layer", ["preprocess", "stem", "head"])
def test_the_halves_are_the_whole(classifier, layer):
    encoder, head = split_at(classifier, layer)
    x = torch.rand(7, 1, 2, 2)
    torch.testing.assert_close(head(encoder(x)), classifier(x))
    assert not encoder.training
    assert not head.training


def test_the_halves_share_the_weights(classifier):
    encoder, head = split_at(classifier, "stem")
    parts = {id(p) for half in (encoder, head) for p in half.parameters()}
    assert parts <= {id(p) for p in classifier.parameters()}
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in classifier.module.stem.parameters()}


@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_a_cut_inside_a_residual_branch_is_refused(classifier, layer):
    with pytest.raises(UsageError, match="residual branch") as caught:
        split_at(classifier, layer)
    assert "'stem'" in caught.value.fix
    assert "'act'" in caught.value.what  # the second tensor that the head would need


def test_a_layer_called_twice_is_refused(classifier):
    with pytest.raises(UsageError, match="called 2 times"):
        split_at(classifier, "act")


def test_a_layer_that_is_not_run_is_refused(classifier):
    with pytest.raises(UsageError, match="not run"):
        split_at(classifier, "unused")


def test_an_unknown_layer_gets_a_suggestion(classifier):
    with pytest.raises(UnknownNameError, match="Did you mean 'stem'"):
        split_at(classifier, "stm")


def test_the_identity_encoder():
    module = nn.Sequential()
    module.add_module("encoder", nn.Identity())
    module.add_module("rest", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    classifier = rsplugins.wrap(module, input_size=(1, 2, 2))
    encoder, head = split_at(classifier, "encoder")
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(encoder(x), x)
    assert torch.equal(head(x), classifier(x))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_tiny_patch16_224"])
def test_timm_models(name):
    size = (3, 224, 224) if name.startswith("vit") else (3, 64, 64)
    classifier = rsplugins.wrap(timm.create_model(name, num_classes=5), std=[0.2] * 3, input_size=size)
    layer = {"resnet18": "layer1", "densenet121": "features.denseblock1", "vit_tiny_patch16_224": "patch_embed"}[name]
    encoder, head = split_at(classifier, layer)
    x = torch.rand(2, *size)
    assert torch.allclose(head(encoder(x)), classifier(x), atol=1e-5)


def test_a_head_that_normalises_is_allowed_and_said():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    classifier = rsplugins.wrap(module, input_size=(1, 2, 2))
    point = cut(analyse(classifier), classifier, "1")
    assert point.renormalises == ("2",)
    assert 0 < point.share < 1


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return x + Counting.calls


def test_a_forward_with_hidden_state_is_caught():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), Counting())
    with pytest.raises(rsplugins.RspluginsError, match="random or has state"):
        split_at(rsplugins.Classifier(module, input_size=(1, 2, 2)), "1")
