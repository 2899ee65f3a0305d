"""What a denoiser goes with: the grid of 8-bit noise, early stops, latent cuts, cheaper votes, the ways to ask for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.denoising.composition import Denoised
from rsplugins.denoising.network import UNetDenoiser
from rsplugins.errors import RspluginsError
from rsplugins.lipschitz import analyse
from tests.denoising.test_denoise import SIZE, classifier, images


class Linear(nn.Module):
    """A linear denoiser of norm 1 / 2 around grey, as layers that torch.fx knows."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.mix.weight.copy_(0.5 * torch.eye(3)[:, :, None, None])
            self.mix.bias.fill_(0.25)

    def forward(self, x):
        return self.mix(x)


def on_the_grid():
    return (images() * 255).round() / 255


def test_the_identity_changes_nothing_on_the_grid_of_images_or_where_sampling_stops_early():
    plain, behind = classifier(), rsplugins.denoise(classifier(), nn.Identity(), sigma=0.25)
    for options in ({"sound": True}, {"stop_at": [0.1]}):
        settings = {"sigma": 0.25, "n0": 20, "n": 500, "batch_size": 50, **options}
        one, other = (rsplugins.certify(each, on_the_grid(), "gaussian", **settings) for each in (plain, behind))
        assert [found.evidence for found in one] == [found.evidence for found in other]
        assert [found.radius for found in one] == [found.radius for found in other]


@pytest.mark.parametrize("method", ["gaussian", "smooth-reduce", "covariance-guided"])
def test_a_learned_denoiser_stands_in_front_of_each_sampler(method):
    torch.manual_seed(0)
    network = UNetDenoiser(3, width=4, scales=2)
    nn.init.normal_(network.last.weight, std=0.02)
    behind = rsplugins.denoise(classifier(), network, sigma=0.25)
    settings = {"n_min": 50} if method == "covariance-guided" else {"n0": 20}
    found = rsplugins.certify(behind, images(), method, sigma=0.25, n=300, **settings)
    assert len(found) == 3
    assert all(one.guarantee == "probabilistic" for one in found)
    if method == "gaussian":  # the votes are those of the composed function, drawn by hand
        noisy = images()[:1] + 0.25 * torch.randn(3000, *SIZE, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            votes = behind.module.classifier(network(noisy, torch.full((3000, 1, 1, 1), 0.25))).argmax(1)
        for label, count in found[0].evidence["estimation"].items():
            assert count / 300 == pytest.approx(float((votes == int(label)).float().mean()), abs=0.12)


class Squares(nn.Module):
    def forward(self, x):
        return 0.5 * x * x


def cut(denoiser):
    head = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    torch.manual_seed(0)
    return rsplugins.denoise(rsplugins.wrap(head, input_size=SIZE), denoiser, sigma=0.25)


def test_latent_takes_a_denoiser_before_the_cut_with_its_bound_alone():
    layer = "classifier.module.0"
    within = cut(Linear())
    found = rsplugins.certify(within, images(), "latent", split=layer, sigma=0.25, n0=20, n=500)
    plain = rsplugins.wrap(within.module.classifier.module, input_size=SIZE)
    alone = rsplugins.certify(plain, 0.25 + 0.5 * images(), "latent", split="0", sigma=0.25, n0=20, n=500)
    for one, other in zip(found, alone, strict=True):
        # the same latents and the same noise, and pixels that count half
        assert one.prediction == other.prediction
        assert one.radius == pytest.approx(2 * other.radius, rel=0.02)
    with pytest.raises(RspluginsError, match=r"'denoiser' .* has no sound Lipschitz bound"):
        rsplugins.certify(cut(Squares()), images(), "latent", split=layer, sigma=0.25, n0=20, n=500)


def test_the_bound_of_a_learned_denoiser_holds_for_stretched_pairs():
    torch.manual_seed(0)
    network = UNetDenoiser(3, width=4, scales=2)
    nn.init.normal_(network.last.weight, std=0.1)
    behind = rsplugins.denoise(classifier(), network, sigma=0.25)
    analysis = analyse(behind, SIZE)
    (node,) = analysis.traced.outputs["denoiser"]
    bound = analysis.constant(node)
    level = torch.full((1, 1, 1, 1), 0.25)
    x = torch.rand(1, *SIZE)
    jacobian = torch.autograd.functional.jacobian(lambda image: network(image, level), x).reshape(192, 192)
    assert float(torch.linalg.svdvals(jacobian)[0]) <= bound


def test_a_composition_is_a_module_of_two_networks_and_a_level():
    behind = cut(Linear())
    assert isinstance(behind.module, Denoised)
    names = {name.split(".")[0] for name in behind.module.state_dict()}
    assert names == {"denoiser", "classifier"}
