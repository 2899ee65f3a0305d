"""A lent GPU machine has torch, timm, pluggy, safetensors, rich and typer, and none of the packages below."""

from __future__ import annotations

import subprocess
import sys

ABSENT = (
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
import sys, tempfile
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
ABSENT = sys.argv[1].split(",")
sys.meta_path.insert(0, Absent())
import torch
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
assert not [name for name in ABSENT if name in sys.modules]
"""


def test_training_certifying_and_packing_need_no_optional_package():
    result = subprocess.run([sys.executable, "-c", PROGRAM, ",".join(ABSENT)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
