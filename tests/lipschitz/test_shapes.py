"""Sizes are numbers while a network is traced, and the batch stays open."""

from __future__ import annotations

import contextlib

import pytest
import torch
from timm.layers import create_conv2d
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.lipschitz import lipschitz_bound, split_at
from tests.lipschitz.test_network_bounds import stretch


class PadsBySize(nn.Module):
    """Pads by what its size lacks, in a loop over sizes, as padded shortcuts and SAME padding do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4)) if height % 4 or width % 4 else x
        y = self.layer(x)
        for side in y.size()[2:]:
            if side > 5:
                y = y * 0.5
        return y


class Open(nn.Module):
    """Uses the size of its batch, as flattening by hand does."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 3)

    def forward(self, x):
        y = self.before(x)
        y = y.view(y.shape[0], 4, -1)
        return self.after(y.reshape(y.size(0), y.size(1) * y.shape[2]))


def wrapped(*layers, size):
    torch.manual_seed(0)
    return rsplugins.wrap(nn.Sequential(*layers), input_size=size)


@pytest.mark.parametrize("size", [(3, 6, 6), (3, 7, 5), (3, 8, 8)])
def test_a_forward_that_looks_at_sizes_is_traced_at_its_size(size):
    torch.manual_seed(0)
    first = PadsBySize()
    inner = first(torch.zeros(1, *size)).numel()
    model = wrapped(first, nn.ReLU(), nn.Flatten(), nn.Linear(inner, 3), size=size)
    bound = lipschitz_bound(model)
    reached = stretch(model, size)
    assert 0.2 * bound < reached <= bound


def test_same_padding_of_timm_has_the_norm_of_its_matrix():
    torch.manual_seed(0)
    layer = create_conv2d(2, 3, 3, stride=2, padding="same")
    assert type(layer).__name__ == "Conv2dSame"
    model = wrapped(layer, nn.Flatten(), size=(2, 7, 6))
    matrix = torch.autograd.functional.jacobian(lambda x: model(x), torch.rand(1, 2, 7, 6)).flatten(1).reshape(-1, 84)
    true = float(torch.linalg.svdvals(matrix.double())[0])
    assert true <= lipschitz_bound(model) <= 1.05 * true


def test_halves_take_any_batch():
    torch.manual_seed(0)
    model = rsplugins.wrap(Open(), input_size=(3, 6, 6))
    encoder, head = split_at(model, "before")
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 6, 6)
        assert torch.allclose(head(encoder(x)), model(x), atol=1e-6)


class Counts(nn.Module):
    """Another function for a batch of another size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 3)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        return y if x.shape[0] == 1 else -y


def test_a_forward_that_looks_at_its_batch_is_refused_as_before():
    with pytest.raises(rsplugins.errors.RspluginsError):
        lipschitz_bound(rsplugins.wrap(Counts(), input_size=(3, 4, 4)))


def test_nothing_of_the_model_changes_while_it_is_traced():
    model = wrapped(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), size=(3, 6, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipschitz_bound(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Caches(nn.Module):
    """Opaque to torch.fx, and keeps a grid that it makes at its first call."""

    def __init__(self):
        super().__init__()
        self.grid = None

    def forward(self, x):
        if x.shape[0] > 0 and self.grid is None:
            self.grid = torch.linspace(0.5, 1.5, x.shape[-1])
        return x * self.grid


@pytest.mark.parametrize("cut", ["preprocess", "0"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_value_without_numbers_is_left_in_a_model_or_with_its_hooks(cut, inside):
    torch.manual_seed(0)
    caches, kept = Caches(), []
    first = nn.Conv2d(3, 3, 1)
    first.register_forward_hook(lambda module, given, found: kept.append(type(found)) if not kept else None)
    middle = nn.Sequential(caches, nn.ReLU()) if inside else caches
    model = rsplugins.wrap(nn.Sequential(first, middle, nn.Flatten(), nn.Linear(108, 3)), input_size=(3, 6, 6))
    for method in ("latent", "lipschitz-margin"):
        options = {"split": cut, "sigma": 0.25, "n0": 10, "n": 50} if method == "latent" else {}
        with contextlib.suppress(rsplugins.errors.RspluginsError):
            rsplugins.certify(model, torch.rand(1, 3, 6, 6), method, **options)
    assert type(caches.grid) in (torch.Tensor, type(None))
    assert not any("Fake" in kind.__name__ for kind in kept)
    caches.grid = None
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 3)
