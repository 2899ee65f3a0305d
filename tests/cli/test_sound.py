"""``certify --sound`` from the command line to the manifest, the claims and the refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import rsplugins.data
from rsplugins.cli.main import build
from rsplugins.errors import UsageError
from rsplugins.models.store import DEFAULT_MODEL


@pytest.fixture
def folder(tmp_path):
    """Six digits as 8-bit grey PNGs, one sub-folder a class."""
    digits = rsplugins.data.load("digits")
    for index in range(6):
        image, label = digits[index]
        place = tmp_path / "pictures" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(place / f"{index}.png")
    return tmp_path / "pictures"


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        build()([str(argument) for argument in arguments])
    return end.value.code


def test_sound_runs_are_recorded_and_lose_the_float_assumption(folder, tmp_path, capsys):
    # The folder holds some of the model's ten classes: which, has to be said.
    source = ("--data", f"folder:{folder}", "--data-option", "classes=0,1,2,3,4,5,6,7,8,9")
    base = ("certify", "--model", f"zoo:{DEFAULT_MODEL}", *source, "--method", "gaussian", "--set", "n=300")
    assert run(*base, "--out", tmp_path / "plain") == 0
    assert run(*base, "--sound", "--out", tmp_path / "sound") == 0
    capsys.readouterr()
    from rsplugins.runs.run import open_run

    claims = {name: [row.claim for row in open_run(tmp_path / name).rows] for name in ("plain", "sound")}
    assert all("float-idealised" in claim.assumptions for claim in claims["plain"])
    assert not any("float-idealised" in claim.assumptions for claim in claims["sound"])
    # Nearly the same radii: the slack for the sampler is tiny, the noise is another stream.
    assert any(claim.radius > 0.2 for claim in claims["sound"])
    manifests = {name: json.loads((tmp_path / name / "manifest.json").read_text()) for name in claims}
    assert "sound" in json.dumps(manifests["sound"])
    assert run("verify", tmp_path / "sound") == 0
    with pytest.raises(UsageError, match="sound"):
        build()([*map(str, base), "--out", str(tmp_path / "sound")], standalone_mode=False)


def test_inputs_off_the_grid_are_refused_with_the_reason(tmp_path):
    arguments = ["certify", "--method", "gaussian", "--set", "n=300", "--stop", "3", "--sound", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=r"8-bit|255|grid"):
        build()(arguments, standalone_mode=False)
