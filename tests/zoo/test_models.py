from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rsplugins
from rsplugins.data import digits
from rsplugins.errors import CheckpointError, UnknownNameError, UsageError
from rsplugins.models import manifest, store
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.training import load_recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "zoo" / DEFAULT_MODEL


@pytest.fixture
def own_zoo(tmp_path, monkeypatch):
    """A zoo of one's own with a copy of the default."""
    shutil.copytree(FOLDER, tmp_path / DEFAULT_MODEL)
    monkeypatch.setenv("RSPLUGINS_ZOO", str(tmp_path))
    return tmp_path / DEFAULT_MODEL


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / manifest.FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_default_is_as_accurate_as_its_manifest_says():
    classifier, data = rsplugins.load(f"zoo:{DEFAULT_MODEL}"), digits.load()
    with torch.no_grad():
        predicted = classifier(torch.stack([image for image, _ in data])).argmax(1).numpy()
    (result,) = [result for result in manifest.read(FOLDER).results if result.metric == "accuracy"]
    assert result.images == 360
    assert round(float(np.mean(predicted == data.labels)), 6) == result.value
    assert result.value > 0.97


def test_the_default_withstands_the_noise_it_was_trained_with():
    classifier, data = rsplugins.load(f"zoo:{DEFAULT_MODEL}"), digits.load()
    images = torch.stack([image for image, _ in data])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noisy = [classifier(images + 0.25 * torch.randn(images.shape, generator=generator)).argmax(1) for _ in range(20)]
    assert float(np.mean([(p.numpy() == data.labels).mean() for p in noisy])) > 0.93


def test_the_default_is_small_and_its_manifest_names_the_recipe_that_is_there():
    read = manifest.read(FOLDER)
    assert sum(weights.bytes for weights in read.weights) < 200_000
    assert hashlib.sha256((FOLDER / read.recipe.file).read_bytes()).hexdigest() == read.recipe.sha256
    assert load_recipe(FOLDER / read.recipe.file) == load_recipe(ROOT / "zoo" / "recipes" / f"{read.id}.toml")
    assert read.id == FOLDER.name


def test_the_wheel_carries_the_default():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        included = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[f"zoo/{DEFAULT_MODEL}"] == f"rsplugins/zoo/embedded/{DEFAULT_MODEL}"


@pytest.mark.parametrize("path", sorted((ROOT / "zoo").glob("*/manifest.toml")), ids=lambda path: path.parent.name)
def test_every_manifest_is_valid_and_survives_a_round_trip(path, tmp_path):
    read = manifest.read(path)
    (tmp_path / "manifest.toml").write_text(manifest.dumps(read))
    assert manifest.read(tmp_path) == read


def test_a_zoo_of_ones_own_comes_first(own_zoo):
    assert store.find(DEFAULT_MODEL) == own_zoo
    assert rsplugins.load(f"zoo:{DEFAULT_MODEL}").num_classes == 10


def test_the_embedded_copy_is_used_where_there_is_no_checkout(tmp_path, monkeypatch):
    package = tmp_path / "rsplugins"
    shutil.copytree(FOLDER, package / "zoo" / "embedded" / DEFAULT_MODEL)
    (tmp_path / "zoo" / DEFAULT_MODEL).mkdir(parents=True)  # somebody else's, beside an installed package
    (tmp_path / "zoo" / DEFAULT_MODEL / manifest.FILE).write_text("")
    monkeypatch.setattr(store, "_PACKAGE", package)
    assert store.find(DEFAULT_MODEL) == package / "zoo" / "embedded" / DEFAULT_MODEL


def test_unknown_models_and_places_are_explained(monkeypatch):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{DEFAULT_MODEL}'"):
        rsplugins.load("zoo:digits-cnn.digits-gausian025-v2")
    monkeypatch.setenv("RSPLUGINS_ZOO", "/no/such/folder")
    with pytest.raises(UsageError, match="RSPLUGINS_ZOO"):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")


def test_weights_that_are_not_those_of_the_manifest_are_refused(own_zoo):
    weights = own_zoo / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")
    weights.write_bytes(b"<!doctype html><title>Too many requests</title>")
    with pytest.raises(CheckpointError, match="HTML page"):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")


@pytest.mark.parametrize(
    "architecture",
    [
        'name = "subprocess:Popen"',
        'name = "rsplugins.models:load"\narguments = { reference = "file:x", architecture = "os:system" }',
        'name = "rsplugins.models.architectures:build"',
        'name = "timm.models:load_checkpoint"',
        'name = "timm.models:resnet18"\narguments = { pretrained_cfg = { file = "x" } }',
        'name = "torchvision.models:get_model"',
        'name = "torchvision.models:resnet18"\narguments = { weights = "DEFAULT" }',
    ],
)
def test_a_manifest_cannot_run_what_it_likes(own_zoo, architecture, monkeypatch):
    monkeypatch.setattr("rsplugins.models.architectures.build", lambda *_, **__: pytest.fail("it was built"))
    edit(own_zoo, 'name = "digits_cnn"', architecture)
    with pytest.raises(CheckpointError, match="which is not built"):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")


@pytest.mark.parametrize("name", ["timm.models:resnet18", "torchvision.models:resnet18", "torchvision.models.video:r3d_18"])
def test_registered_networks_of_timm_and_torchvision_may_be_named(name):
    from rsplugins.models.zoo import _check_architecture

    _check_architecture(manifest.Architecture(name=name, num_classes=10, arguments={"zero_init_residual": True}), "x")


def test_a_model_without_weights_says_why(own_zoo):
    text = (own_zoo / manifest.FILE).read_text()
    (own_zoo / manifest.FILE).write_text('no_weights = "The data need a licence."\n' + text[: text.index("[[weights]]")])
    with pytest.raises(CheckpointError, match=r"no weights: The data need a licence\."):
        rsplugins.load(f"zoo:{DEFAULT_MODEL}")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('id = "digits-cnn.', 'id = "Digits ', "id: String should match"),
        ("bytes = ", "bytes = -", r"weights\.0\.bytes"),
        ("seed = 0", "sede = 0", r"training\.sede: Extra inputs"),
        ('device = "cpu"\nminutes', "minutes", r"training\.device: Field required"),
        ('metric = "accuracy"', 'metric = "acr"\nguarantee = "deterministic"', "needs norm and certifier"),
        ('records = "predict"', 'records = "../predict"', r"results\.0\.records"),
        ('function_sha256 = "', 'function_sha256 = ""\n# ', "weights need function_sha256"),
        ('metric = "accuracy"', 'metric = "acr"\nalpha = 0.001', "alpha belongs to a probabilistic result"),
        ("[licences]", 'no_weights = "lost"\n[licences]', "give weights, or a package that has them, or say in no_weights"),
        ("[licences]", "[licences]\nfood = 1", r"licences\.food: Extra inputs"),
        ("[input]", "[input", "cannot be read"),
    ],
)
def test_manifests_that_break_the_schema_name_the_field(own_zoo, old, new, text):
    edit(own_zoo, old, new)
    with pytest.raises(CheckpointError, match=text):
        manifest.read(own_zoo)
