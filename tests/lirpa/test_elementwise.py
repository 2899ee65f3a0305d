"""Operators that auto-LiRPA 0.3 lacks: lines against a fine grid, networks against what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.lirpa import elementwise
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.operators import PluginOperators
from tests.lirpa.cases import D


def _clip(low, high, first, last):
    ends = torch.full_like(low, first), torch.full_like(low, last)
    return elementwise._ramp(low, high, *ends)


FUNCTIONS = {
    "relu6": (lambda x: x.clamp(0, 6), lambda low, high: _clip(low, high, 0.0, 6.0)),
    "hardtanh": (lambda x: x.clamp(-1, 1), lambda low, high: _clip(low, high, -1.0, 1.0)),
    "hardsigmoid": (F.hardsigmoid, lambda low, high: elementwise.BoundHardSigmoid({"alpha": 1 / 6}, [], 0, {}).lines(low, high)),
    "erf": (torch.erf, lambda low, high: elementwise.BoundErf(None, [], 0, {}).lines(low, high)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_hold_on_every_interval(name):
    function, lines = FUNCTIONS[name]
    ends = torch.cat([torch.linspace(-8, 8, 65, dtype=D), torch.tensor([-1.0, 0.0, 1.0, 3.0, 6.0, -3.0, 1e-9], dtype=D)])
    low, high = torch.combinations(ends.sort().values, 2).t().contiguous()
    (a, b), (c, d) = lines(low, high)
    share = torch.linspace(0, 1, 801, dtype=D).unsqueeze(1)
    x = low + share * (high - low)
    assert (a * x + b <= function(x) + 1e-12).all()
    assert (c * x + d >= function(x) - 1e-12).all()
    # and they meet the function: above at its upper end or on the way there, below likewise
    assert ((c * x + d - function(x)).amin(0) < 1e-9).all()
    assert ((function(x) - a * x - b).amin(0) < 1e-9).all()


LAYERS = {"relu6": nn.ReLU6, "hardtanh": nn.Hardtanh, "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "gelu": nn.GELU}


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", LAYERS)
def test_bounds_contain_what_the_network_computes(name, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), LAYERS[name](), nn.Flatten(), nn.Linear(16, 8), LAYERS[name](), nn.Linear(8, 3)).to(
        D
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that every piece of the functions is met
    x = torch.rand(2, 1, 4, 4, dtype=D)
    network = BoundNetwork(model, x, operators=PluginOperators(), dtype=D)
    for eps in (0.0, 0.01, 0.3):
        low, high = network.bounds(x, eps, method=method)
        points = x + eps * (2 * torch.rand(2000, *x.shape, dtype=D) - 1).sign()
        found = model(points.flatten(0, 1)).view(2000, 2, 3)
        assert (found >= low - 1e-9).all()
        assert (found <= high + 1e-9).all()
    low, high = network.bounds(x, 0.0, method=method)
    assert (high - low).max() < 1e-8


def test_certificates_name_no_plugin_of_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 2)).eval()
    (found,) = rsplugins.certify(rsplugins.wrap(model, input_size=(1, 4, 4)), torch.rand(1, 1, 4, 4), "crown", progress=False)
    assert str(found.guarantee) == "deterministic"
    assert found.radius > 0


def test_a_hard_sigmoid_that_falls_is_refused():
    # torch has none; an exporter's attribute could say so, and the rising lines would be wrong for it.
    with pytest.raises(NotImplementedError, match="falls"):
        elementwise.BoundHardSigmoid({"alpha": -0.2}, [], 0, {})
