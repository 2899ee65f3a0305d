from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from rsplugins.cli.main import build
from rsplugins.errors import ParameterError
from rsplugins.training import Trainer
from rsplugins.training.benchmark import measure
from rsplugins.training.recipe import load_recipe
from rsplugins.training.time_budget import train_all
from tests.training.cases import recipe, small_net, table

RECIPE = """
name = "digits-tiny"
[data]
name = "digits"
[model]
architecture = "digits_cnn"
mean = [0.305]
std = [0.376]
arguments = {width = 8}
[training]
epochs = 8
batch_size = 64
[optimizer]
lr = 0.1
"""


@pytest.fixture
def run():
    torch.set_num_threads(1)
    return lambda *arguments: CliRunner().invoke(build(), [str(argument) for argument in arguments])


def test_train_then_attack_from_the_command_line(tmp_path, run):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    result = run("train", path, "--out", tmp_path / "out", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["status"] == "finished"
    assert record["last_epoch"]["test_accuracy"] > 0.7
    options = [
        option
        for value in ("architecture=digits_cnn", 'arguments={"width": 8}', "mean=[0.305]", "std=[0.376]")
        for option in ("--model-option", value)
    ]
    model = f"file:{tmp_path / 'out/model.safetensors'}"
    result = run(
        "attack",
        "--model",
        model,
        *options,
        "--data",
        "digits",
        "--eps",
        "16/255",
        "--images",
        50,
        "--autoattack",
        "none",
        "--out",
        tmp_path / "attack",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    assert "EMPIRICAL" in result.stdout
    assert "certified" not in result.stdout
    assert "PGD-20" in result.stdout


def test_a_time_budget_covers_all_recipes(tmp_path, run):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    result = run("train", path, path, "--out", tmp_path / "out", "--time-budget", "0", "--device", "cpu")
    assert result.exit_code == 0
    assert "budget was spent before: digits-tiny, digits-tiny" in result.stderr
    tiny = load_recipe(path)
    (stopped,) = train_all([tiny, tiny], [tmp_path / "a", tmp_path / "b"], device="cpu", time_budget=1e-9 + 0.05, quiet=True)
    assert stopped.status == "stopped"
    assert (tmp_path / "a/model.safetensors").exists()
    assert not (tmp_path / "b").exists()


def test_wrong_recipes_end_the_command_with_code_two(tmp_path, run):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace("epochs", "epochz"))
    result = run("train", path)
    assert isinstance(result.exception, ParameterError)
    assert result.exception.exit_code == 2
    path.write_text(RECIPE)
    assert isinstance(run("train", path, "--set", "training.epochs=0").exception, ParameterError)


def test_the_benchmark_measures_the_trainer_against_bare_passes(tmp_path):
    torch.set_num_threads(1)
    trainer = Trainer(recipe(), tmp_path, train=table(64), test=table(), module=small_net(), hooks=[], device="cpu", quiet=True)
    speed = measure(trainer, seconds=0.4, rounds=2)
    assert speed.trainer > 0
    assert speed.limit > 0
    assert speed.ratio == speed.trainer / speed.limit
    assert not list(tmp_path.iterdir())
