"""Devices without float64 (read, not run: an Apple GPU is pretended): what needs float64 is computed on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.double import bring, brought, double, has_double
from rsplugins.errors import InputValueError, UsageError
from rsplugins.host import get_host

sys.path.insert(0, str(Path(__file__).parent))
from tests.pretended_mps import OnMps, pretended, to_mps

IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return rsplugins.wrap(nn.Sequential(*layers), mean=0.4, std=0.3, input_size=(3, 6, 6))


def test_the_pretended_device_refuses_what_the_real_one_does(monkeypatch):
    with pretended(monkeypatch):
        x = OnMps(torch.rand(3))
        assert x.device.type == "meta"
        assert (x + x).device.type == "meta"
        assert torch.zeros(2, device=x.device).device.type == "meta"
        assert torch.equal((2 * x).cpu(), 2 * x.held)
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            x.to("cpu", torch.float64)
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64).to(x.device)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


def test_tensors_and_modules_find_a_home(monkeypatch):
    with pretended(monkeypatch):
        x = OnMps(torch.rand(3))
        assert (double(x).dtype, double(x).device.type) == (torch.float64, "cpu")
        back = bring(double(x), x.device, torch.float32)
        assert (back.device.type, back.dtype) == ("meta", torch.float32)
        assert torch.equal(back.cpu(), x.cpu())
        module = brought(to_mps(nn.Linear(2, 2)), torch.float64)
        assert (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float64)
    assert has_double(torch.device("cpu"))
    assert has_double(torch.device("cuda"))
    assert not has_double(torch.device("mps"))


CERTIFIERS = {
    "lipschitz-margin": {},
    "ibp": {"norm": "linf"},
    "crown": {"norm": "l2"},
    "sound-etb": {"norm": "linf"},
    "etb": {"norm": "linf", "variant": "whole"},
    "covariance": {},
    "gaussian": {"n": 300, "n0": 50},
    "gaussian-soft": {"n": 300, "n0": 50},
    "smooth-reduce": {"n": 300, "n0": 50},
    "latent": {"split": "2", "n": 300, "n0": 50},
    "covariance-guided": {"n_min": 50, "n": 300},
}


@pytest.mark.parametrize("name", CERTIFIERS)
def test_certifiers_run_where_there_is_no_float64_as_on_the_cpu(name, monkeypatch):
    known = {entry.name for entry in get_host().entries("certifier")}
    if name not in known:
        pytest.skip("no such certifier")
    settings = CERTIFIERS[name]
    expected = rsplugins.certify(network(), IMAGES, name, **settings)
    with pretended(monkeypatch):
        found = rsplugins.certify(to_mps(network()), IMAGES, name, **settings)
    assert [one.prediction for one in found] == [one.prediction for one in expected]
    assert [one.radius for one in found] == pytest.approx([one.radius for one in expected], rel=1e-5)


class Scaled(nn.Module):
    """Multiplies by constants that are made anew in each pass, whose values are compared between passes."""

    def __init__(self, mixes):
        super().__init__()
        self.last, self.mixes = nn.Linear(108, 3), mixes

    def forward(self, x):
        x = x.flatten(1) * (2.0 * torch.ones(108, device=x.device))
        return self.last(x - x.mean(0) if self.mixes else x)


def scaled(mixes=False):
    torch.manual_seed(0)
    return rsplugins.wrap(Scaled(mixes), input_size=(3, 6, 6))


def test_constants_of_a_forward_are_compared_where_there_is_no_float64(monkeypatch):
    expected = rsplugins.certify(scaled(), IMAGES, "ibp", norm="linf")
    with pretended(monkeypatch):
        found = rsplugins.certify(to_mps(scaled()), IMAGES, "ibp", norm="linf")
    assert [one.radius for one in found] == pytest.approx([one.radius for one in expected], rel=1e-5)


def test_mixed_images_are_found_where_there_is_no_float64(monkeypatch):
    with pretended(monkeypatch), pytest.raises(UsageError, match="first at layer 'last'"):
        rsplugins.certify(to_mps(scaled(mixes=True)), IMAGES, "gaussian", n=300, n0=50)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-soft"])
def test_float64_images_are_refused_in_words_where_there_is_no_float64(name, monkeypatch):
    with pretended(monkeypatch), pytest.raises(InputValueError, match=r"images.float\(\)"):
        rsplugins.certify(to_mps(network()), IMAGES.double(), name, n=300, n0=50)
