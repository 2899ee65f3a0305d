"""One step of a diffusion model: against the posterior mean of a Gaussian prior, which is known, and with the real library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.denoising.diffusion import OneStep
from rsplugins.denoising.door import load_denoiser
from rsplugins.errors import CheckpointError, ParameterError

MEAN, SPREAD = 0.3, 0.4
"""Of the prior of pixels in [-1, 1]."""


class Exact(nn.Module):
    """What a perfect model says of x_t where x_0 is N(MEAN, SPREAD^2) by pixel; a learned variance besides."""

    def __init__(self, alphas: torch.Tensor, prediction: str) -> None:
        super().__init__()
        self.alphas, self.prediction = alphas, prediction

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        a = self.alphas[step].view(-1, 1, 1, 1)
        clean = MEAN + SPREAD**2 * a.sqrt() / (a * SPREAD**2 + 1 - a) * (x - a.sqrt() * MEAN)
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        found = {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}[self.prediction]
        return torch.cat([found, torch.full_like(found, 7.0)], 1)


def posterior(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[image | raw pixels x] where noise of sigma lies on raw pixels, by the formula for two Gaussians, on [0, 1]."""
    mean, variance = (MEAN + 1) / 2, (SPREAD / 2) ** 2
    return mean + variance / (variance + sigma**2) * (x - mean)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_a_perfect_model_gives_the_posterior_mean(prediction, sigma):
    # sigma itself is a level of this schedule, so that nothing is rounded
    levels = torch.tensor([0.02, 0.12, 0.25, 0.5, 1.0, 3.0], dtype=torch.float64)
    alphas = (1 / (1 + (2 * levels) ** 2)).float()
    x = torch.rand(5, 3, 4, 4)
    found = OneStep(Exact(alphas, prediction), alphas, prediction)(x, torch.full((5, 1, 1, 1), sigma))
    assert torch.allclose(found, posterior(x, sigma), atol=1e-5)


def test_between_two_steps_the_nearer_is_taken_and_each_image_has_its_own():
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    x, sigmas = torch.rand(3, 1, 4, 4), (0.1, 0.33, 0.8)
    found = OneStep(Exact(alphas, "epsilon"), alphas)(x, torch.tensor(sigmas).view(3, 1, 1, 1))
    for image, noisy, sigma in zip(found, x, sigmas, strict=True):
        assert torch.allclose(image, posterior(noisy, sigma), atol=5e-3)


def test_a_score_model_is_told_sigma_itself():
    class Score(nn.Module):
        def forward(self, x, sigma):
            mean, variance = (MEAN + 1) / 2, (SPREAD / 2) ** 2
            return (mean - x) / (variance + sigma.view(-1, 1, 1, 1) ** 2)

    x = torch.rand(4, 3, 4, 4)
    assert torch.allclose(OneStep(Score(), None)(x, torch.full((4, 1, 1, 1), 0.5)), posterior(x, 0.5), atol=1e-5)


def test_the_schedule_is_looked_at():
    with pytest.raises(ParameterError, match="do not fall"):
        OneStep(nn.Identity(), torch.tensor([0.5, 0.9]))


def unet(**changes):
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(sample_size=16, layers_per_block=1, norm_num_groups=4, **shape, **changes)


@pytest.mark.parametrize("schedule", ["DDPMScheduler", "DDIMScheduler", "ScoreSdeVeScheduler"])
def test_a_model_of_the_library_stands_in_front_of_a_classifier(tmp_path, schedule):
    network = unet(time_embedding_type="fourier") if schedule == "ScoreSdeVeScheduler" else unet()
    import diffusers

    network.save_pretrained(tmp_path / "unet")
    getattr(diffusers, schedule)().save_pretrained(tmp_path / "scheduler")
    classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)), input_size=(3, 12, 12))
    behind = rsplugins.denoise(classifier, f"diffusers:{tmp_path}", sigma=0.25)  # 12 x 12, and the model knows 16 x 16
    x = torch.rand(2, 3, 12, 12)
    level = torch.full((2, 1, 1, 1), 0.25)
    denoiser = behind.module.denoiser
    assert denoiser(x, level).shape == x.shape
    assert torch.allclose(behind(x), classifier(denoiser(x, level)), atol=1e-5)
    (result,) = rsplugins.certify(behind, x[:1], "gaussian", sigma=0.25, n0=10, n=100)
    assert result.guarantee == "probabilistic"


def test_what_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no unet"):
        load_denoiser(f"diffusers:{tmp_path}")
    unet(num_class_embeds=3).save_pretrained(tmp_path / "unet")
    import diffusers

    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="conditional"):
        load_denoiser(f"diffusers:{tmp_path}")
    unet().save_pretrained(tmp_path / "unet")
    diffusers.EulerDiscreteScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    load_denoiser(f"diffusers:{tmp_path}")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="FlowMatchEuler"):
        load_denoiser(f"diffusers:{tmp_path}")
