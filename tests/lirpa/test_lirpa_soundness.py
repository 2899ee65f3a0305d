"""What is called sound contains every point anybody finds; what is called tighter is."""

import pytest
import torch
from lirpa_cases import in_ball, reached

from rsplugins.certificate import Norm
from rsplugins.classifier import wrap
from rsplugins.lirpa.etb import PASS_THROUGH, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork

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


@pytest.mark.slow
def test_alpha_crown_contains_and_is_no_looser_than_crown(network, images):
    bounds = BoundNetwork(network, images)
    low, high = bounds.bounds(images, 0.03, method="alpha-crown")
    crown_low, crown_high = bounds.bounds(images, 0.03, method="crown")
    assert bool((high - low).mean() <= (crown_high - crown_low).mean() + 1e-5)
    for i in range(len(images)):
        outputs = reached(network, images[i : i + 1], 0.03, Norm.LINF)
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
