"""Orthogonal encoders: shapes, distances kept, and a bound read off the weights as they are."""

import builtins

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.errors import ParameterError, PluginUnavailableError
from rsplugins.lipschitz import UnsupportedLayerError, analyse, lipschitz_bound, orthogonal_network, plain, split_at
from rsplugins.lipschitz.orthogonal import MaxMin

pytest.importorskip("orthogonium")
SIZES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar10-small": (3, 32, 32)}


def encoder_bound(network, size):
    analysis = analyse(rsplugins.Classifier(network, input_size=size))
    return analysis.constant(analysis.cut_nodes()["encoder"])


@pytest.mark.parametrize("size", SIZES)
def test_the_encoder_keeps_distances_and_the_bound_says_so(size):
    torch.manual_seed(0)
    network = plain(orthogonal_network(size, width=16))
    bound = encoder_bound(network, SIZES[size])
    assert 1.0 - 1e-4 <= bound <= 1.003
    x, y = torch.rand(2, 50, *SIZES[size], dtype=torch.float64)
    encoder = network.encoder.double()
    stretch = (encoder(x) - encoder(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert stretch.max().item() <= bound
    assert stretch.min().item() > 0.3


def test_sizes_and_split():
    torch.manual_seed(1)
    classifier = rsplugins.wrap(plain(orthogonal_network("mnist", width=8, num_classes=7)), input_size=(1, 28, 28))
    assert classifier.num_classes == 7
    encoder, head = split_at(classifier, "encoder")
    x = torch.rand(2, 1, 28, 28)
    assert encoder(x).shape == (2, 64, 7, 7)
    assert torch.allclose(head(encoder(x)), classifier(x))


@pytest.mark.slow
def test_imagenet_size():
    torch.manual_seed(2)
    network = plain(orthogonal_network("imagenet", width=8))
    assert network(torch.rand(1, 3, 224, 224)).shape == (1, 1000)
    assert network.encoder(torch.rand(1, 3, 224, 224)).shape == (1, 128, 28, 28)
    assert encoder_bound(network, (3, 224, 224)) <= 1.01


def test_plain_computes_the_same_with_plain_layers():
    torch.manual_seed(3)
    network = orthogonal_network("mnist", width=8).eval()
    frozen = plain(network)
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(network(x), frozen(x), atol=1e-6)
    assert all(type(m) is nn.Conv2d for m in frozen.modules() if isinstance(m, nn.Conv2d))
    assert not any("parametrizations" in key for key in frozen.state_dict())


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_network_takes_the_weights_without_orthogonium(size, monkeypatch):
    torch.manual_seed(7)
    frozen = plain(orthogonal_network(size, width=8))
    monkeypatch.setattr("rsplugins.lipschitz.orthogonal._orthogonal_convolution", lambda: pytest.fail("asked for orthogonium"))
    network = orthogonal_network(size, width=8, parametrised=False).eval()
    network.load_state_dict(frozen.state_dict())
    x = torch.rand(3, *SIZES[size])
    torch.testing.assert_close(network(x), frozen(x))
    assert encoder_bound(network, SIZES[size]) == encoder_bound(frozen, SIZES[size])


def test_max_min_orders_pairs_of_channels_and_keeps_their_norm():
    x = torch.tensor([[3.0, 1.0, 2.0, 5.0]])[:, :, None, None]
    assert MaxMin()(x).flatten().tolist() == [3.0, 5.0, 2.0, 1.0]
    batch = torch.randn(50, 6, 4, 4)
    assert torch.allclose(MaxMin()(batch).flatten(1).norm(dim=1), batch.flatten(1).norm(dim=1))
    assert lipschitz_bound(rsplugins.Classifier(nn.Sequential(MaxMin(), nn.Flatten()), input_size=(4, 2, 2))) == 1.0


def test_the_bound_is_not_assumed():
    torch.manual_seed(4)
    network = plain(orthogonal_network("mnist", width=8))
    before = encoder_bound(network, (1, 28, 28))
    with torch.no_grad():
        network.encoder[0].weight.mul_(3.0)
    assert encoder_bound(network, (1, 28, 28)) == pytest.approx(3.0 * before, rel=1e-3)


def test_weights_that_change_at_every_reading_are_refused():
    torch.manual_seed(5)
    network = orthogonal_network("mnist", width=8).eval()
    assert not torch.equal(network.encoder[0].weight, network.encoder[0].weight)
    with pytest.raises(UnsupportedLayerError, match=r"lipschitz\.plain"):
        encoder_bound(network, (1, 28, 28))


def test_normalisation_multiplies_the_bound():
    torch.manual_seed(6)
    network = nn.Sequential(plain(orthogonal_network("mnist", width=8)).encoder, nn.Flatten())
    plain_bound = lipschitz_bound(rsplugins.Classifier(network, input_size=(1, 28, 28)))
    assert lipschitz_bound(rsplugins.Classifier(network, std=0.3081, input_size=(1, 28, 28))) == pytest.approx(
        plain_bound / 0.3081, rel=1e-3
    )


def test_unknown_size():
    with pytest.raises(ParameterError, match="mnist"):
        orthogonal_network("svhn")


def test_without_orthogonium(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.startswith("orthogonium"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PluginUnavailableError, match=r"rsplugins\[orthogonal\]"):
        orthogonal_network("mnist")
