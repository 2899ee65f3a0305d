from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import recipe, small_net, table

from rsplugins.classifier import Classifier
from rsplugins.errors import UsageError
from rsplugins.training import Hooks, ImageTable, Trainer, load_recipe
from rsplugins.training.packing import certify, half_precision, pack, score
from rsplugins.training.recipe import EvaluationSettings
from rsplugins.training.registry import make_hook
from rsplugins.training.trainer import build_classifier

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
    data = ImageTable(torch.zeros(1, *size), torch.zeros(1, dtype=torch.long), 10)
    classifier = build_classifier(found, data).eval()
    assert classifier(data.images).shape == (1, 10)


def test_the_votes_are_those_of_the_gaussian_certifier(tmp_path):
    import rsplugins

    model, test = _model(), table(12, seed=3)
    found = certify(model, test, EvaluationSettings(sigma=0.2, n=500, stride=4), tmp_path / "gaussian.jsonl")
    images, labels = test.take(torch.arange(0, 12, 4))
    certificates = rsplugins.certify(model, images, method="gaussian", sigma=0.2, n0=100, n=500, alpha=0.001, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "gaussian.jsonl").read_text().splitlines()]
    # Noise is a function of the input's index, which is 0, 1, 2 for a tensor: the first input's is the same.
    assert rows[0]["evidence"] == certificates[0].evidence
    assert [row["index"] for row in rows] == [0, 4, 8]
    assert [row["label"] for row in rows] == labels.tolist()
    assert (found["done"], found["planned"], found["guarantee"]) == (3, 3, "probabilistic")


def test_scores_are_recomputed_from_votes():
    parameters = {"sigma": 0.5, "n0": 10, "n": 10_000, "alpha": 0.001, "stop_at": []}

    def row(label, votes):
        return {"label": label, "error": None, "evidence": {"selection": {"1": 10}, "estimation": votes}}

    rows = [row(1, {"1": 10_000}), row(2, {"1": 10_000}), row(1, {"1": 5_000, "0": 5_000}), row(1, {"1": 9_000, "0": 1_000})]
    found = score(rows, parameters)
    # 3.1986 sigma for unanimous votes (METHODS, section 0); .89022 is the Clopper-Pearson bound of 9,000 in 10,000.
    assert found["acr"] == pytest.approx((3.1986 * 0.5 + 1.2277 * 0.5) / 4, abs=2e-4)
    # Radius 0 stands for an abstention, which is not right.
    assert found["certified_accuracy"]["0.5"] == 0.5
    assert found["certified_accuracy"]["0.75"] == 0.25


def test_certification_goes_on_where_it_stopped_and_refuses_other_weights(tmp_path):
    settings, test = EvaluationSettings(sigma=0.2, n=200, stride=1), table(12, seed=3)
    whole = certify(_model(), test, settings, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    partial = certify(_model(), test, settings, path, deadline=0.0)
    assert partial["done"] == 0
    certify(_model(), test, settings, path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"index": 5, "lab')
    again = certify(_model(), test, settings, path)
    assert again["done"] == 12
    assert again["acr"] == whole["acr"]
    with pytest.raises(UsageError, match="other weights"):
        certify(_model(seed=1), test, settings, path)


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


def test_packing_stores_what_was_measured(tmp_path):
    settings = dataclasses.replace(
        recipe(epochs=6), evaluation=EvaluationSettings(sigma=0.1, n=200, stride=3, eps=0.05, images=12)
    )
    test = table(12, seed=3)
    trainer = Trainer(
        settings, tmp_path / "run", train=table(), test=test, module=small_net(), hooks=[], device="cpu", quiet=True
    )
    folder = tmp_path / "packed"
    found = pack(trainer.fit(), settings, test, folder)
    stored = small_net()
    stored.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    classifier = Classifier(stored, mean=(0.3,), std=(0.25,), input_size=(1, 4, 4), num_classes=3)
    assert classifier.fingerprint() == found["weights"]
    assert found["gaussian"]["done"] == 4
    assert (folder / "records/gaussian.jsonl").exists()
    assert json.loads((folder / "training.json").read_text())["weights"]["dtype"] == "float16"
    # Three classes are too few for AutoAttack: said, not hidden.
    assert "at least 4 classes" in found["attack"]["left_out"]
    assert found["attack"]["autoattack"] is None
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 500_000


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
    assert found["gaussian"]["done"] == 4
    folder = tmp_path / path.stem
    assert {entry.name for entry in folder.iterdir()} == {
        "model.safetensors", "recipe.toml", "training.json", "metrics.jsonl", "curves.png", "evaluation.json", "records",
    }  # fmt: skip


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
    fit, measure = script.Trainer.fit, script.measure

    def failing_fit(self, *arguments):
        if self.recipe.name == names[1]:
            raise torch.OutOfMemoryError("no memory left")
        return fit(self, *arguments)

    def failing_measure(classifier, recipe, *rest, **named):
        if recipe.name == names[0]:
            raise ValueError("a fault of ours")
        return measure(classifier, recipe, *rest, **named)

    monkeypatch.setattr(script.Trainer, "fit", failing_fit)
    monkeypatch.setattr(script, "measure", failing_measure)
    assert script.main(_recipes(tmp_path, *names)) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["name"] for line in printed.out.splitlines()] == [names[2]]
    assert f"{names[1]}: FAILED in training: no memory left" in printed.err
    assert f"{names[0]}: FAILED in measuring: a fault of ours" in printed.err
    # The weights of the first were stored before anything was measured.
    assert json.loads((tmp_path / "out" / names[0] / "evaluation.json").read_text())["accuracy"] > 0.05
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
