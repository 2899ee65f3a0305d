"""Denoised smoothing: nothing changes behind the identity, a half-space behind a linear denoiser has the known radius."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.denoising.network import UNetDenoiser, save
from rsplugins.errors import CheckpointError, OutputValueError, ParameterError, RspluginsError, UsageError

SIZE = (3, 8, 8)
METHODS = {
    "gaussian": {"sigma": 0.25, "n0": 20, "n": 500},
    "gaussian-soft": {"sigma": 0.25, "n0": 20, "n": 500},
    "smooth-reduce": {"sigma": 0.25, "n0": 20, "n": 500},
    "covariance": {"sigma": 0.25},
    "covariance-guided": {"sigma": 0.25, "n": 500, "n_min": 50},
    "ibp": {},
    "patch-cleanser": {"patch": 2, "masks": 2},
}


def classifier(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    return rsplugins.wrap(module, input_size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))


def images(count=3):
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(1))


class Shrinks(nn.Module):
    """Moves pixels to the middle, the more the louder the noise; linear."""

    def forward(self, x, sigma):
        return 0.5 + (x - 0.5) / (1 + 4 * sigma**2)


class Fixed(nn.Module):
    sigma = 0.25

    def forward(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@pytest.mark.parametrize("method", METHODS)
def test_behind_the_identity_nothing_changes(method):
    plain, behind = classifier(), rsplugins.denoise(classifier(), nn.Identity(), sigma=0.25)
    assert torch.equal(plain(images()), behind(images()))
    both = [rsplugins.certify(each, images(), method, batch_size=50, **METHODS[method]) for each in (plain, behind)]
    for one, other in zip(*both, strict=True):
        assert one.prediction == other.prediction
        # Estimates come by torch.export's graph where the normalisation is no longer the first layer.
        off = {"ibp": 1e-4, "covariance": 0.02, "covariance-guided": 0.02}.get(method, 0)
        assert one.radius == pytest.approx(other.radius, abs=off)
        if method not in ("ibp", "covariance", "covariance-guided"):
            assert one.evidence == other.evidence


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_a_half_space_behind_a_linear_denoiser_has_its_known_radius(sigma):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, generator=generator) / 192**0.5
    linear = nn.Linear(192, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight, -weight]))
        linear.bias.copy_(torch.tensor([0.1, -0.1]) - linear.weight.sum(1) / 2)
    model = rsplugins.wrap(nn.Sequential(nn.Flatten(), linear), input_size=SIZE)
    behind = rsplugins.denoise(model, Shrinks(), sigma=sigma)
    x = images(8)
    found = rsplugins.certify(behind, x, "gaussian", sigma=sigma, n0=100, n=20_000)
    # The boundary in raw pixels: w (0.5 + (x - 0.5) / k) + b = 0.
    k = 1 + 4 * sigma**2
    with torch.no_grad():
        margin = linear((0.5 + (x - 0.5) / k).flatten(1))[:, 0]
    true = margin.abs() * k / weight.norm()
    for one, radius, side in zip(found, true.tolist(), margin.tolist(), strict=True):
        assert one.radius <= radius
        if one.prediction is not None:
            assert one.prediction == (0 if side > 0 else 1)
        p = stats.norm.cdf(radius / sigma)
        if 0.55 < p < 0.999:
            assert one.radius > 0.8 * radius - 0.03


def test_both_networks_are_what_is_certified():
    found = rsplugins.denoise(classifier(), Shrinks(), sigma=0.25)
    denoiser = UNetDenoiser(3, width=4, scales=1)
    one = rsplugins.denoise(classifier(), denoiser, sigma=0.25)
    before = one.fingerprint()
    with torch.no_grad():
        denoiser.first.weight.add_(1)
    assert one.fingerprint() != before
    assert one.structure() != rsplugins.denoise(classifier(), denoiser, sigma=0.5).structure()
    assert "Shrinks" in found.source
    assert "0.25" in found.source
    assert found.input_size == SIZE
    assert found.num_classes == 4


class Channels(nn.Module):
    def forward(self, x):
        return x[:, :1]


class Scale(nn.Module):
    def forward(self, x):
        return 255 * x


class Noise(nn.Module):
    def forward(self, x, sigma):
        return x + sigma * torch.randn_like(x)


class Batch(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True) + 0.5


class Gray(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("denoiser", "error", "text"),
    [
        (Channels(), OutputValueError, "returned"),
        (Scale(), OutputValueError, "scale"),
        (Gray(), OutputValueError, "channels"),
        (Noise(), UsageError, "random"),
        (Batch(), UsageError, "other images of its batch"),
        (lambda x: x, ParameterError, "nn.Module"),
        ("nothing", UsageError, "scheme"),
        ("file:/nowhere/denoiser.safetensors", CheckpointError, "no file"),
        ("elsewhere:x", RspluginsError, "elsewhere"),
    ],
)
def test_a_denoiser_that_is_none_is_refused(denoiser, error, text):
    with pytest.raises(error, match=text):
        rsplugins.denoise(classifier(), denoiser, sigma=0.25)


class LateNoise(nn.Module):
    """Passes the first look, and draws noise from its twentieth call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1e-3 * torch.randn_like(x) * (self.calls > 20)


def test_what_the_first_look_misses_the_samplers_refuse():
    behind = rsplugins.denoise(classifier(), LateNoise(), sigma=0.25)
    with pytest.raises(UsageError):
        rsplugins.certify(behind, images(), "gaussian", sigma=0.25, n0=20, n=500)


@pytest.mark.parametrize("made", ["0.25", (0.1,), (0.1, 0.2, 0.3), {"sigma": 0.25}])
def test_a_denoiser_that_says_no_level_is_refused(made):
    denoiser = nn.Identity()
    denoiser.sigma = made
    with pytest.raises(ParameterError, match="it was made for"):
        rsplugins.denoise(classifier(), denoiser, sigma=0.25)


def test_another_noise_level_is_refused_or_warned_of():
    with pytest.raises(ParameterError, match=r"made for sigma 0\.25, not 0\.5"):
        rsplugins.denoise(classifier(), Fixed(), sigma=0.5)
    with pytest.raises(ParameterError, match=r"is for 0\.25"):
        rsplugins.certify(rsplugins.denoise(classifier(), Fixed(), sigma=0.25), images(), "gaussian", sigma=0.5, n0=20, n=100)
    with pytest.warns(UserWarning, match="denoise"):
        rsplugins.certify(rsplugins.denoise(classifier(), Shrinks(), sigma=0.25), images(), "gaussian", sigma=0.5, n0=20, n=100)
    with pytest.warns(UserWarning, match="made for sigma 0 to 1"):
        rsplugins.denoise(classifier(), UNetDenoiser(3, width=4), sigma=1.5)
    for sigma in (-0.1, float("nan"), True, "0.25"):
        with pytest.raises(ParameterError):
            rsplugins.denoise(classifier(), nn.Identity(), sigma=sigma)


def test_a_denoiser_learns_and_a_file_of_it_works_on_the_command_line(tmp_path):
    torch.manual_seed(0)
    denoiser = UNetDenoiser(1, width=16, scales=1)
    data = rsplugins.load_data("digits", split="train")
    clean = torch.stack([data[i][0] for i in range(600)])
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for _ in range(150):
        batch = clean[torch.randint(len(clean), (64,))]
        sigma = 0.7 * torch.rand(64, 1, 1, 1)
        loss = F.mse_loss(denoiser(batch + sigma * torch.randn_like(batch), sigma), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    level = torch.full((len(clean), 1, 1, 1), 0.5)
    noisy = clean + level * torch.randn_like(clean)
    with torch.no_grad():
        assert F.mse_loss(denoiser(noisy, level), clean) < 0.5 * F.mse_loss(noisy, clean)
    save(denoiser, tmp_path / "d.safetensors")
    model = rsplugins.load("zoo:digits-cnn.digits-gaussian025-v2")
    from_file = rsplugins.denoise(model, f"file:{tmp_path / 'd.safetensors'}", sigma=0.25)
    assert torch.allclose(from_file(clean[:4]), rsplugins.denoise(model, denoiser, sigma=0.25)(clean[:4]), atol=1e-5)
    line = [
        str(Path(sys.executable).with_name("rsplugins")),
        "certify",
        "--model",
        "zoo:digits-cnn.digits-gaussian025-v2",
        "--data",
        "digits",
    ]
    line += ["--denoiser", f"file:{tmp_path / 'd.safetensors'}", "--method", "gaussian", "--set", "sigma=0.25", "--set", "n=200"]
    line += ["--set", "n0=20", "--stride", "60", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"][0]["status"] == "done"
    assert "behind the denoiser file:" in (tmp_path / "run" / "manifest.json").read_text()
    plain = rsplugins.open_run(tmp_path / "run")
    assert plain.summary()["inputs"] > 0


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, str(tmp_path / "a.safetensors"))
    (tmp_path / "b.safetensors").write_text("no")
    for name in ("a", "b"):
        with pytest.raises(CheckpointError):
            rsplugins.denoise(classifier(), f"file:{tmp_path / name}.safetensors", sigma=0.25)
