"""A lent GPU machine has torch, pluggy, safetensors, rich and typer, but none of the packages below, rsplugins among them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
ABSENT = (
    "rsplugins",
    "pydantic",
    "pydantic_core",
    "auto_LiRPA",
    "robustbench",
    "pyautoattack",
    "autoattack",
    "orthogonium",
    "huggingface_hub",
    "av",
)

PROGRAM = """
import importlib.util, sys, tempfile
sys.path.insert(0, sys.argv[1])
from rsplugins.cli.main import build
build()
from rsplugins.training import Recipe, Trainer
from rsplugins.training.packing import pack
from rsplugins.training.recipe import DataSettings, EvaluationSettings, ModelSettings, TrainingSettings
recipe = Recipe(name="bare", data=DataSettings(name="digits"), model=ModelSettings(architecture="digits_cnn"),
                training=TrainingSettings(epochs=1), hooks=({"name": "sound-etb", "eps": 0.01},),
                evaluation=EvaluationSettings(sigma=0.25, n=50, stride=180))
with tempfile.TemporaryDirectory() as folder:
    from pathlib import Path
    trainer = Trainer(recipe, folder + "/run", device="cpu", quiet=True)
    found = pack(trainer.fit(), recipe, trainer.test, Path(folder) / "packed")
assert found["gaussian"]["done"] == 2
assert not [name for name in sys.argv[2].split(",") if importlib.util.find_spec(name)]
"""


@pytest.fixture
def bare(tmp_path):
    """Run this Python with its packages but those in ABSENT; without ``site``, so that no .pth file brings them back."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages"):
            for entry in folder.iterdir():
                name = re.split(r"[-.]", entry.name)[0].lower()
                if name not in map(str.lower, ABSENT) and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-S", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
        )

    return run


def test_training_certifying_and_packing_need_no_optional_package(bare):
    result = bare("-c", PROGRAM, CHECKOUT, ",".join(ABSENT[1:]))
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_zoo_is_trained_from_a_checkout_that_is_not_installed(bare, tmp_path):
    name = "digits-cnn.digits-gaussian050-v1"
    short = [text for key in ("epochs=2", "evaluate_every=2") for text in ("--set", f"training.{key}")]
    short += ["--set", "evaluation.n=50", "--set", "evaluation.stride=90", "--set", "schedule.warmup=0"]
    recipe = CHECKOUT / "zoo" / "recipes" / f"{name}.toml"
    result = bare(CHECKOUT / "zoo" / "train_all.py", recipe, "--out", tmp_path / "out", "--device", "cpu", *short)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert (found["name"], found["gaussian"]["done"]) == (name, 4)
    assert (tmp_path / "out" / name / "model.safetensors").is_file()
