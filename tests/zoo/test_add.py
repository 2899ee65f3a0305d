from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import rsplugins
from rsplugins.cli import main
from rsplugins.errors import CheckpointError, RunError, UsageError
from rsplugins.models import architectures, manifest
from rsplugins.zoo.add import add_evidence, add_trained
from rsplugins.zoo.sources import title_of
from rsplugins.zoo.verify import verify
from rsplugins.zoo.weights import save

ZOO = Path(__file__).resolve().parents[2] / "zoo"
RECIPE = ZOO / "recipes" / "digits-cnn.digits-gaussian025-v2.toml"
NAME = RECIPE.stem


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["rsplugins", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `rsplugins train` leaves after one epoch."""
    from rsplugins.training import Trainer, load_recipe

    out = tmp_path_factory.mktemp("train")
    recipe = load_recipe(RECIPE, {"training.epochs": 1, "schedule.warmup": 0.5})
    Trainer(recipe, out, device="cpu", quiet=True).fit()
    return out


def test_from_training_to_a_verified_model_by_the_commands(trained, shop, tmp_path, monkeypatch):
    run(monkeypatch, "zoo", "add", trained, "--zoo", shop)
    read = manifest.read(shop / NAME)
    assert read.results == ()
    assert read.weights[0].dtype == "float16"
    assert (read.training.device, read.training.epochs) == ("cpu", 1)
    assert "cuda" not in read.training.versions
    options = ["--method", "gaussian", "--set", "sigma=0.25", "--set", "n=500", "--stride", "60", "--out", tmp_path / "run"]
    run(monkeypatch, "certify", "--model", f"zoo:{NAME}", "--data", "digits", *options)
    attack = ["--eps", "0.1", "--images", "8", "--autoattack", "none", "--out", tmp_path / "attack", "--device", "cpu"]
    run(
        monkeypatch, "certify", "--model", f"zoo:{NAME}", "--data", "digits", "--method", "predict", "--out", tmp_path / "predict"
    )
    run(monkeypatch, "attack", "--model", f"zoo:{NAME}", "--data", "digits", *attack)
    runs = [word for name in ("run", "predict", "attack") for word in ("--evidence", tmp_path / name)]
    run(monkeypatch, "zoo", "add", NAME, *runs, "--zoo", shop)
    report = verify(shop / NAME)
    assert report.problems == []
    assert report.rerun == ["predict on 64 inputs", "attack on 8 inputs", "gaussian on 3 inputs"]
    results = manifest.read(shop / NAME).results
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = json.loads((tmp_path / "attack" / "summary.json").read_text())["attacks"]
    assert next(result.value for result in results if result.metric == "acr") == pytest.approx(summary["acr"], abs=1.1e-6)
    attacked = {result.certifier: result for result in results if result.metric == "accuracy_under_attack"}
    assert attacked["PGD-20"].value == pytest.approx(found["pgd"], abs=1e-6)
    assert {str(result.guarantee) for result in attacked.values()} == {"empirical"}
    assert str(tmp_path) not in (shop / NAME / "records" / "gaussian" / "manifest.json").read_text()


@pytest.fixture
def stored(tmp_path):
    """A folder as `zoo/train_all.py` leaves it: weights already rounded, and complete runs beside them."""
    from rsplugins.training import Trainer, load_recipe
    from rsplugins.zoo.weights import store

    recipe = load_recipe(RECIPE, {"training.epochs": 1, "schedule.warmup": 0.5})
    trainer = Trainer(recipe, tmp_path / "run", device="cpu", quiet=True)
    classifier = store(trainer.fit(), trainer.test, tmp_path / "stored")
    data = rsplugins.load_data("digits")
    rsplugins.certify(classifier, data, "predict", out=tmp_path / "stored/runs/predict", progress=False)
    settings = {"out": tmp_path / "stored/runs/gaussian", "indices": data.select(stride=90), "progress": False}
    run = rsplugins.certify(classifier, data, "gaussian", n=200, **settings)
    return tmp_path / "stored", run.summary()["acr"], classifier.fingerprint()


def test_the_runs_beside_a_trained_model_are_taken_over(stored, shop):
    trained, acr, fingerprint = stored
    folder = add_trained(trained, shop)
    results = {result.metric: result for result in manifest.read(folder).results}
    assert results["acr"].value == pytest.approx(acr, abs=1.1e-6)
    assert (results["accuracy"].images, results["accuracy"].records) == (360, "predict")
    assert verify(folder).problems == []
    assert manifest.read(folder).function_sha256 == fingerprint


def test_a_run_of_the_first_inputs_only_is_left_out_and_said(stored, shop):
    path = stored[0] / "runs" / "gaussian" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    said: list[str] = []
    folder = add_trained(stored[0], shop, say=said.append)
    assert len(said) == 1
    assert "the run gaussian is left out" in said[0]
    assert {result.metric for result in manifest.read(folder).results} == {"accuracy"}


def test_a_run_on_other_data_keeps_their_name(trained, shop, tmp_path):
    folder = add_trained(trained, shop)
    other = shutil.copytree(ZOO / NAME / "records" / "gaussian", tmp_path / "other")
    about = json.loads((other / "manifest.json").read_text())
    about["model"]["sha256"] = manifest.read(folder).function_sha256
    for data, named in (
        ({"name": "digits", "reference": "digits"}, "digits"),
        ({"name": "something-else", "reference": "mine"}, "mine"),
        ({"name": "folder:test", "reference": "folder:/somewhere/cifar10/test"}, "folder:/somewhere/cifar10/test"),
    ):
        (other / "manifest.json").write_text(json.dumps({**about, "data": {**about["data"], **data}}))
        add_evidence(folder, other)
        assert {result.data for result in manifest.read(folder).results if result.records == "gaussian"} == {named}


def test_a_run_takes_the_place_of_one_with_its_parameters_and_of_no_other(trained, shop, tmp_path):
    folder = add_trained(trained, shop)
    other = shutil.copytree(ZOO / NAME / "records" / "gaussian", tmp_path / "other")
    about = json.loads((other / "manifest.json").read_text())
    about["model"]["sha256"] = manifest.read(folder).function_sha256
    n = about["parameters"]["n"]
    for changed, expected in (
        ({}, {"gaussian"}),
        ({"alpha": 0.01}, {"gaussian", f"gaussian-n{n}"}),
        ({"alpha": 0.01}, {"gaussian", f"gaussian-n{n}"}),
        ({"alpha": 0.02}, {"gaussian", f"gaussian-n{n}", "gaussian-2"}),
    ):
        changed_run = {**about, "parameters": {**about["parameters"], **changed}}
        (other / "manifest.json").write_text(json.dumps(changed_run))
        add_evidence(folder, other)
        assert {result.records for result in manifest.read(folder).results if result.metric == "acr"} == expected


def test_a_folder_of_the_recipes_data_is_named_without_its_place():
    from rsplugins.runs.manifest import read_manifest
    from rsplugins.zoo.add import _reference

    name = "latent-cifar10.cifar10-jpeg-gaussian025-small-v1"
    run = read_manifest(ZOO / name / "records" / "gaussian")
    run = run.model_copy(update={"data": {"name": "folder:test", "reference": "folder:/somewhere/cifar10/test"}})
    assert _reference(run, manifest.read(ZOO / name)) == "folder:cifar10/test"


def test_evidence_about_other_weights_is_refused(trained, shop, tmp_path):
    folder = add_trained(trained, shop)
    other = shutil.copytree(ZOO / NAME / "records" / "gaussian", tmp_path / "other")
    with pytest.raises(CheckpointError, match="is about other weights than"):
        add_evidence(folder, other)


def test_an_unfinished_run_is_refused(trained, shop, tmp_path):
    folder = add_trained(trained, shop)
    other = shutil.copytree(ZOO / NAME / "records" / "gaussian", tmp_path / "other")
    lines = (other / "records.jsonl").read_text().splitlines(keepends=True)
    (other / "records.jsonl").write_text("".join(lines[:-7]))
    with pytest.raises(RunError, match="7 inputs have no record"):
        add_evidence(folder, other)


def test_an_unfinished_training_is_refused(trained, shop, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    record = json.loads((copy / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps({**record, "status": "stopped", "epochs": 0}))
    with pytest.raises(UsageError, match="is not trained to the end: 0 of 1 epochs"):
        add_trained(copy, shop)
    with pytest.raises(UsageError, match="holds no trained model"):
        add_trained(tmp_path, shop)


def test_large_weights_lie_in_files_below_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("rsplugins.zoo.weights.LIMIT", 700_000)
    monkeypatch.setattr("rsplugins.zoo.weights.HEADER", 20_000)
    network = architectures.build("mnist_cnn")
    (tmp_path / "model.safetensors").touch()
    shards = save(tmp_path, network, "float32")
    assert [shard.file for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.file for shard in shards]
    assert all(shard.bytes < 700_000 for shard in shards)
    from safetensors.torch import load_file

    stored = {name: value for shard in shards for name, value in load_file(tmp_path / shard.file).items()}
    assert all(torch.equal(stored[name], value) for name, value in network.state_dict().items())
    assert stored.keys() == network.state_dict().keys()


def test_several_files_of_weights_load_as_one_model(model, monkeypatch):
    monkeypatch.setattr("rsplugins.zoo.weights.LIMIT", 60_000)
    monkeypatch.setattr("rsplugins.zoo.weights.HEADER", 20_000)
    read = manifest.read(model)
    from rsplugins.models.zoo import load_folder

    weights = save(model, load_folder(model).module, "float16")
    assert len(weights) > 1
    (model / manifest.FILE).write_text(manifest.dumps(read.model_copy(update={"weights": weights})))
    assert verify(model).problems == []
    assert load_folder(model).fingerprint() == rsplugins.load(f"zoo:{NAME}").fingerprint()


@pytest.mark.parametrize(
    ("comment", "title"),
    [
        ("# MNIST, Gaussian augmentation at sigma 0.5; two CPU cores.", "MNIST, Gaussian augmentation at sigma 0.5."),
        ("# CIFAR-10, at sigma 0.25: minutes on one H200.", "CIFAR-10, at sigma 0.25."),
        ("# MNIST, adversarial training.", "MNIST, adversarial training."),
    ],
)
def test_a_title_says_nothing_about_machines(tmp_path, comment, title):
    (tmp_path / "x.toml").write_text(f'{comment}\n\nname = "x"\n')
    assert title_of(tmp_path / "x.toml") == title
    assert title_of(tmp_path / "missing.toml") == "missing"
