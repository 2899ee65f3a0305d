"""The contract of denoisers: what comes with the package keeps it, and each kind of wrong one breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rsplugins.cli.main import build
from rsplugins.denoising import door
from rsplugins.denoising.network import UNetDenoiser, save
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.testing import denoiser_checks, denoisers


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    network = UNetDenoiser(3, width=4, scales=2)
    nn.init.normal_(network.last.weight, std=0.05)
    save(network, tmp_path / "d.safetensors")
    return str(tmp_path / "d.safetensors")


def test_a_denoiser_in_a_file_keeps_it(file):
    outcomes = [check.outcome() for check in denoiser_checks("file", file, input_size=(3, 8, 8))]
    assert {outcome.name: outcome.detail for outcome in outcomes if outcome.status != "passed"} == {}
    assert len(outcomes) == 8


class Drawing(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Averaging(nn.Module):
    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True) + 0.5


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, x):
        found = x + 0.01 * self.seen.clamp(0, 1)
        self.seen = x.mean().detach()
        return found


class Cropping(nn.Module):
    def forward(self, x):
        return x[..., 1:]


class Whitening(nn.Module):
    def forward(self, x):
        return 255 * x


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (Drawing, "no chance, no memory"),
        (Averaging, "images are independent"),
        (Remembering, "no chance, no memory"),
        (Cropping, "image for image"),
        (Whitening, "image for image"),
        (lambda: nn.Dropout(0.5).train(), "denoiser"),
    ],
)
def test_each_kind_of_wrong_denoiser_breaks_it(kind, broken, monkeypatch):
    def load(reference, **options):
        return kind()

    monkeypatch.setattr(door, "load_denoiser", load)
    monkeypatch.setattr(denoisers, "load_denoiser", load)
    outcomes = {check.name: check.outcome() for check in denoiser_checks("file", "x", input_size=(3, 8, 8))}
    assert outcomes[broken].status == "failed", outcomes[broken].detail
    if broken != "denoiser":
        assert outcomes["certifiable"].status == "failed"


def test_commands_that_take_a_model_take_a_denoiser(tmp_path):
    save(UNetDenoiser(1, width=4, scales=2), tmp_path / "d.safetensors")
    behind = [f"zoo:{DEFAULT_MODEL}", "--denoiser", f"file:{tmp_path / 'd.safetensors'}", "--json"]
    done = CliRunner().invoke(build(), ["lipschitz", *behind])
    assert done.exit_code == 0, done.output
    assert "denoiser.first" in done.output
    done = CliRunner().invoke(build(), ["bench", "--n", "8", "--rounds", "1", "--model", *behind])
    assert done.exit_code == 0, done.output
    assert "behind the denoiser" in done.output
