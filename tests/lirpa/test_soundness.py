"""What is called sound contains every point anybody finds; what is called tighter is."""

import pytest
import torch
from torch import nn

from rsplugins.certificate import Norm
from rsplugins.classifier import wrap
from rsplugins.lirpa.etb import PASS_THROUGH, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import D, in_ball, reached

EPS = {Norm.LINF: 0.03, Norm.L2: 0.2, Norm.L1: 0.5}
SOUND = {
    "ibp": (None, "ibp"),
    "crown-ibp": (None, "crown-ibp"),
    "crown": (None, "crown"),
    "sound-etb": (SOUND_ETB, "ibp"),
    "pass-through": (PASS_THROUGH, "ibp"),
    "sound-etb under crown-ibp": (SOUND_ETB, "crown-ibp"),
}


def assert_inside(outputs, low, high):
    assert bool((outputs >= low - 1e-9).all())
    assert bool((outputs <= high + 1e-9).all())


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("method", SOUND)
def test_contains_samples_and_attacks(network, images, method, norm):
    operators, propagation = SOUND[method]
    bounds = BoundNetwork(network, images, operators=operators)
    low, high = bounds.bounds(images, EPS[norm], norm=norm, method=propagation)
    for i in range(len(images)):
        assert_inside(reached(network, images[i : i + 1], EPS[norm], norm), low[i], high[i])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibp", "sound-etb"])
def test_contains_a_hundred_thousand_samples(network, images, method):
    operators, propagation = SOUND[method]
    low, high = BoundNetwork(network, images, operators=operators).bounds(images, 0.05, method=propagation)
    for i in range(len(images)):
        assert_inside(reached(network, images[i : i + 1], 0.05, Norm.LINF, count=100_000), low[i], high[i])


def dense(*layers):
    """ReLU network from pairs of weights and biases."""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(len(weight[0]), len(weight))
        linear.weight.data, linear.bias.data = torch.tensor(weight), torch.tensor(bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).to(D).eval()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_an_inputs_bounds_do_not_depend_on_its_batch(method):
    """auto-LiRPA bounds a neuron by CROWN alone, looser here, once interval bounds leave it unstable for another input.

    y = relu(a) + b - 4.5 is at least 0.48 around the first input by intervals, at least -0.52 by CROWN, and crosses 0 around
    the second. The output, relu(y) - relu(y + 10) + 11, is 1 where y is known to be positive.
    """
    others = 10
    module = dense(
        ([[1.0, 0.0], [0.0, 0.01]], [0.0, 5.0]),
        ([[1.0, 1.0], [1.0, 1.0], *[[0.0, 0.0]] * others], [-4.5, 5.5] + [1.0] * others),
        ([[1.0, -1.0] + [0.0] * others], [11.0]),
    )
    inputs = torch.tensor([[0.5, 0.0], [0.5, -60.0]], dtype=D)
    bounds = BoundNetwork(module, inputs)
    together = bounds.bounds(inputs, 1.5, method=method)
    alone = bounds.bounds(inputs[:1], 1.5, method=method)
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], both[0], rtol=0, atol=1e-6)
        if method != "ibp":
            assert one.item() == pytest.approx(1.0, abs=1e-6)


def test_crown_is_at_least_as_tight_as_with_interval_bounds_in_between(network, images):
    bounds = BoundNetwork(network, images)
    for eps in (0.001, 0.03, 0.5):
        low, high = bounds.bounds(images, eps, method="crown")
        wide_low, wide_high = bounds.bounds(images, eps, method="crown-ibp")
        assert float((high - low).mean()) <= float((wide_high - wide_low).mean()) + 1e-9


def test_alpha_crown_finds_the_best_slope():
    """relu(x) - x / 2 over [-1, 2] is at least 0: below relu lies x / 2. CROWN takes x, and finds -1/2."""
    module = dense(([[1.0], [1.0]], [0.0, 5.0]), ([[1.0, -0.5]], [2.5]))  # the second neuron is always active: x + 5
    x = torch.tensor([[0.5]], dtype=D)
    bounds = BoundNetwork(module, x)
    low, _ = bounds.bounds(x, 1.5, method="crown")
    best, _ = bounds.bounds(x, 1.5, method="alpha-crown")
    assert low.item() == pytest.approx(-0.5)
    assert best.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_alpha_crown_contains_and_is_no_looser_than_crown(network, images):
    bounds = BoundNetwork(network, images)
    low, high = bounds.bounds(images, 0.1, method="alpha-crown")
    crown_low, crown_high = bounds.bounds(images, 0.1, method="crown")
    assert bool((low >= crown_low - 1e-6).all())
    assert bool((high <= crown_high + 1e-6).all())
    assert float((high - low).mean()) < float((crown_high - crown_low).mean())
    for i in range(len(images)):
        outputs = reached(network, images[i : i + 1], 0.1, Norm.LINF)
        assert bool((outputs >= low[i] - 1e-5).all())
        assert bool((outputs <= high[i] + 1e-5).all())


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("operators", [SOUND_ETB, PASS_THROUGH])
def test_sound_etb_is_never_wider_than_ibp(network, images, norm, operators):
    specification = torch.randn(2, 7, 5, dtype=torch.float64)
    for eps in (0.001, 0.03, 0.5):
        for rows in (None, specification):
            low, high = BoundNetwork(network, images, operators=operators).bounds(images, eps, norm=norm, specification=rows)
            wide_low, wide_high = BoundNetwork(network, images).bounds(images, eps, norm=norm, specification=rows)
            assert bool((low >= wide_low - 1e-12).all())
            assert bool((high <= wide_high + 1e-12).all())


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_normalisation_by_channel_is_part_of_the_ball(network, images, method, norm):
    # auto-LiRPA on its own drops an l2 ball at the subtraction of the mean: its interval bounds are then a point.
    classifier = wrap(network, mean=[0.4, 0.6], std=[0.2, 0.5])
    classifier.module.to(torch.float64)
    low, high = BoundNetwork(classifier, images).bounds(images, EPS[norm] / 4, norm=norm, method=method)
    for i in range(len(images)):
        assert_inside(reached(classifier, images[i : i + 1], EPS[norm] / 4, norm), low[i], high[i])


@pytest.mark.parametrize("norm", [Norm.L2, Norm.L1])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_a_layer_that_is_not_affine_first_falls_back_to_the_box(images, method, norm):
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            self.register_buffer("mean", torch.full((1, 2, 1, 1), 0.5))

        def forward(self, x):
            return self.body((x - self.mean) / 0.25)

    module = Centred().to(torch.float64).eval()
    low, high = BoundNetwork(module, images).bounds(images, 0.1, norm=norm, method=method)
    for i in range(len(images)):
        assert_inside(reached(module, images[i : i + 1], 0.1, norm), low[i], high[i])


@pytest.mark.parametrize("norm", list(Norm))
def test_clip_contains_the_clipped_ball_and_only_tightens(network, images, norm):
    bounds = BoundNetwork(network, images.round())  # pixels at 0 and 1, where the box cuts most
    x = images.round()
    low, high = bounds.bounds(x, EPS[norm], norm=norm, clip=True)
    free_low, free_high = bounds.bounds(x, EPS[norm], norm=norm)
    assert bool((low >= free_low - 1e-12).all())
    assert bool((high <= free_high + 1e-12).all())
    assert norm is not Norm.LINF or bool((high - low).sum() < (free_high - free_low).sum())
    for i in range(len(x)):
        points = in_ball(x[i : i + 1], EPS[norm], norm, 2000).clamp(0, 1)
        assert_inside(network(points), low[i], high[i])


def test_each_image_has_its_own_eps(network, images):
    bounds = BoundNetwork(network, images)
    for norm in Norm:
        both, _ = bounds.bounds(images, torch.tensor([0.01, 0.04]), norm=norm)
        alone = [bounds.bounds(images[i : i + 1], eps, norm=norm)[0] for i, eps in enumerate((0.01, 0.04))]
        torch.testing.assert_close(both, torch.cat(alone))
