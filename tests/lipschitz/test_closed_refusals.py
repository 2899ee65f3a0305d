"""What the closed table refuses is named: the call, the argument, the layer; what it bounds by hand is right."""

import operator

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.lipschitz import UnsupportedLayerError, lipschitz_bound, tables


class Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def classifier_of(function, size=(1, 2, 3)):
    net = nn.Sequential()
    net.add_module("culprit", Inner(function))
    net.add_module("flat", nn.Flatten())
    return rsplugins.Classifier(net.eval(), input_size=size)


def out_of_sight(x, y):
    torch.add(x, 1, out=y)
    return y


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.sum(x, 1, dtype=torch.int64), r"sum is called with dtype=torch\.int64"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), r"div is called with rounding_mode='floor'"),
        (lambda x: torch.add(x, 1, out=torch.zeros(0)), "add is called with out=a tensor"),
        (lambda x: out_of_sight(x, x.clone()), "add is called with out=a tensor"),
        (lambda x: x.clamp(min=x.mean()), "the min of .clamp depends on the image"),
        (lambda x: torch.sub(x, x, alpha=float("inf")), "alpha=inf, which is no finite number"),
        (lambda x: torch.cat(operator.add(x.chunk(3, -1), (x,)), 3), "of add is not one tensor"),
        (lambda x: torch.nn.functional.leaky_relu(x, float("nan")), "negative_slope=nan"),
        (lambda x: torch.nn.functional.interpolate(x, size=5, mode="bilinear", antialias=True), "antialias=True"),
    ],
    ids=["dtype", "rounding", "out", "unused", "bound", "alpha", "tuple", "slope", "antialias"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_refusal_names_the_call_the_argument_and_the_layer(function, said):
    with pytest.raises(UnsupportedLayerError, match=said) as caught:
        lipschitz_bound(classifier_of(function))
    assert "'culprit'" in caught.value.what


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (lambda x: torch.rsub(x, 1.0, alpha=5), 5.0),
        (lambda x: torch.rsub(input=x, other=1.0, alpha=-5), 5.0),
        (lambda x: torch.sub(torch.ones(3), x, alpha=4), 4.0),
        (lambda x: torch.clamp(x[:, :, :, :1], min=torch.zeros(16)), 4.0),
        (lambda x: torch.cat(x.tensor_split((2, 1), -1), -1), 2.0**0.5),
        (lambda x: torch.nn.functional.pad(x, (2, 2, 0, 0), mode="reflect"), 3.0**0.5),
        (lambda x: x[:, :, [1, 1, -1, 0]], 3.0**0.5),
    ],
    ids=["rsub", "keywords", "sub", "clamp", "split", "reflect", "list"],
)
def test_known_faults_have_the_bound_that_is_reached(function, truth):
    assert lipschitz_bound(classifier_of(function)) == pytest.approx(truth, rel=1e-9)


def test_a_rule_that_forgets_an_argument_refuses_it(monkeypatch):
    def forgetful(call):
        call.ignore("shifts")
        return call.source()[0].through(1.0)

    entry = tables.Entry(forgetful, "input shifts dims")
    monkeypatch.setitem(tables.FUNCTIONS, torch.roll, entry)
    with pytest.raises(UnsupportedLayerError, match="roll is called with dims=1, which its rule does not cover"):
        lipschitz_bound(classifier_of(lambda x: torch.roll(x, shifts=1, dims=1)))
