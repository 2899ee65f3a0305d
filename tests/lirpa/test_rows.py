"""Row norms of a block's Jacobian against the Jacobian itself, written out as a dense matrix."""

import math

import pytest
import torch
from torch import nn

from rsplugins.lirpa import deviation as rows
from rsplugins.lirpa.deviation import Ball, Convolution, Dense, deviation

D = torch.float64
CONVOLUTIONS = {
    "padded": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}),
    "strided": ({"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "grouped": ({"kernel_size": 3, "groups": 2}, {"kernel_size": 2, "groups": 4, "stride": 3}),
    "uneven": (
        {"kernel_size": (3, 2), "padding": (1, 2), "dilation": 2},
        {"kernel_size": (2, 3), "stride": 2, "padding": (2, 1)},
    ),
}


def matrix(module, shape):
    """A linear module as a matrix (outputs, inputs)."""
    with torch.no_grad():
        return module(torch.eye(math.prod(shape), dtype=D).view(-1, *shape)).flatten(1).T


def as_layer(convolution):
    return Convolution(
        convolution.weight.detach(),
        None,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )


@pytest.fixture(params=CONVOLUTIONS)
def pair(request):
    torch.manual_seed(0)
    first, second = CONVOLUTIONS[request.param]
    return nn.Conv2d(4, 8, bias=False, **first).to(D), nn.Conv2d(8, 4, bias=False, **second).to(D)


def expected(jacobian, weights, order, eps):
    weighted = jacobian * weights.flatten(1).unsqueeze(1)
    dual = {math.inf: 1, 2.0: 2, 1.0: math.inf}[order]
    return eps * torch.linalg.vector_norm(weighted, ord=dual, dim=-1)


@pytest.mark.parametrize("order", [math.inf, 2.0, 1.0])
@pytest.mark.parametrize("chunk", [2**24, 3000])
def test_two_convolutions(pair, order, chunk, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    first, second = pair
    x = torch.rand(2, 4, 11, 10, dtype=D)
    z = first(x).detach()
    slopes = torch.rand_like(z)
    a, b = matrix(first, x.shape[1:]), matrix(second, z.shape[1:])
    jacobian = torch.stack([b @ torch.diag(s.flatten()) @ a for s in slopes])
    weights = torch.rand_like(x) if order == math.inf else torch.ones_like(x)
    found = deviation(as_layer(second), slopes, as_layer(first), Ball(weights, order, 0.3))
    assert found.shape == second(z).shape
    torch.testing.assert_close(found.flatten(1), expected(jacobian, weights, order, 0.3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", [math.inf, 2.0, 1.0])
@pytest.mark.parametrize("chunk", [2**24, 500])
def test_linear_after_convolution(pair, order, chunk, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    first, _ = pair
    x = torch.rand(2, 4, 9, 10, dtype=D)
    slopes = torch.rand_like(first(x).detach())
    weight = torch.randn(2, 7, slopes[0].numel(), dtype=D)  # differs by input, as with a specification
    jacobian = torch.stack(
        [w @ torch.diag(s.flatten()) @ matrix(first, x.shape[1:]) for w, s in zip(weight, slopes, strict=True)]
    )
    weights = torch.rand_like(x) if order == math.inf else torch.ones_like(x)
    found = deviation(Dense(weight), slopes, as_layer(first), Ball(weights, order, 0.3))
    torch.testing.assert_close(found, expected(jacobian, weights, order, 0.3), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("order", [math.inf, 2.0, 1.0])
def test_linear_after_linear(order):
    a, b, slopes, weights = torch.randn(6, 4, dtype=D), torch.randn(3, 6, dtype=D), torch.rand(2, 6, dtype=D), torch.ones(2, 4)
    jacobian = torch.stack([b @ torch.diag(s) @ a for s in slopes])
    found = deviation(Dense(b), slopes, Dense(a), Ball(weights.to(D), order, 0.3))
    torch.testing.assert_close(found, expected(jacobian, weights, order, 0.3))


def test_gradients_are_those_of_the_dense_jacobian():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 2, 2, padding=1, bias=False).to(D), nn.Conv2d(2, 1, 2, stride=2, bias=False).to(D)
    slopes, weights = torch.rand(1, 2, 4, 4, dtype=D), torch.rand(1, 1, 3, 3, dtype=D)

    def of_weights(a, b):
        return deviation(Convolution(b, stride=(2, 2)), slopes, Convolution(a, padding=(1, 1)), Ball(weights)).sum()

    assert torch.autograd.gradcheck(of_weights, (first.weight, second.weight))


def test_a_convolution_cannot_close_over_a_linear_layer():
    with pytest.raises(TypeError):
        deviation(Convolution(torch.ones(1, 1, 1, 1)), torch.ones(1, 1), Dense(torch.ones(1, 1)), Ball(torch.ones(1, 1)))
