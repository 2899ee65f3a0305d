"""Models whose noise is not that of image pixels: behind an orthogonal encoder, and on videos; from the recipe to the zoo."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import rsplugins
from rsplugins.cli import main
from rsplugins.lipschitz import analyse
from rsplugins.models import manifest
from rsplugins.training import ImageTable, Trainer, load_recipe
from rsplugins.zoo import cards
from rsplugins.zoo.add import add_evidence, add_trained
from rsplugins.zoo.verify import verify
from rsplugins.zoo.weights import store

RECIPES = Path(__file__).resolve().parents[2] / "zoo" / "recipes"
LATENT = "latent-mnist.mnist-latent025-v1"
VIDEO = "video-cnn.moving-digits-gaussian050-v1"


def images_of(rows, seed):
    """28x28 images whose class is the position of the bright block."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = 0.2 * torch.rand(rows, 1, 28, 28, generator=generator), torch.arange(rows) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 14 * (label // 2) : 14 * (label // 2) + 14, 14 * (label % 2) : 14 * (label % 2) + 14] += 0.7
    return ImageTable((images * 255).round().to(torch.uint8), labels, 4)


def write_mnist(root, table):
    """The test images as idx files."""
    place = root / "MNIST" / "raw"
    place.mkdir(parents=True)
    shape = (len(table), 28, 28)
    pixels = b"".join(size.to_bytes(4, "big") for size in shape) + table.images.numpy().tobytes()
    (place / "t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + pixels)
    labels = len(table).to_bytes(4, "big") + table.labels.to(torch.uint8).numpy().tobytes()
    (place / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + labels)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["rsplugins", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_gives_plain_weights_and_a_bound_close_to_1(tmp_path, precision):
    pytest.importorskip("orthogonium")
    changes = {"training.epochs": 2, "training.precision": precision, "training.batch_size": 32, "schedule.warmup": 1}
    recipe = load_recipe(RECIPES / f"{LATENT}.toml", {**changes, "model.arguments": {"width": 8, "orthogonal": True}})
    train = images_of(256, 0)
    result = Trainer(recipe, tmp_path, device="cpu", quiet=True, train=train, test=images_of(64, 1)).fit()
    assert not any("parametrizations" in name for name in result.classifier.state_dict())
    assert result.record["architecture"] == {"name": "latent_mnist", "arguments": {"width": 8}, "num_classes": 4}
    analysis = analyse(result.classifier)
    assert 1 - 1e-3 <= analysis.constant(analysis.cut_nodes()["encoder"]) <= 1.003
    loaded = rsplugins.load(
        f"file:{tmp_path / 'model.safetensors'}",
        architecture="latent_mnist",
        arguments={"width": 8},
        num_classes=4,
        input_size=(1, 28, 28),
    )
    assert loaded.fingerprint() == result.classifier.fingerprint()
    x, _ = train.take(torch.arange(8))
    assert torch.allclose(loaded(x), result.classifier(x), atol=1e-5)  # the layouts in memory differ


@pytest.mark.slow
def test_a_latent_model_gets_into_the_zoo_with_its_certificates(tmp_path, shop, monkeypatch):
    pytest.importorskip("orthogonium")
    test = images_of(40, 1)
    write_mnist(tmp_path / "data", test)
    changes = {"training.epochs": 3, "training.batch_size": 32, "schedule.warmup": 1}
    recipe = load_recipe(RECIPES / f"{LATENT}.toml", {**changes, "model.arguments": {"width": 8, "orthogonal": True}})
    # Ten classes, as the files on disk are read with.
    tables = [ImageTable(table.images, table.labels, 10) for table in (images_of(256, 0), test)]
    trainer = Trainer(recipe, tmp_path / "run", device="cpu", quiet=True, train=tables[0], test=tables[1])
    store(trainer.fit(), trainer.test, tmp_path / "stored")
    folder = add_trained(tmp_path / "stored", shop, data_root=tmp_path / "data")
    assert manifest.read(folder).weights[0].dtype == "float16"
    assert manifest.read(folder).architecture.arguments == {"width": 8}
    options = [
        "--method",
        "latent",
        "--set",
        "split=encoder",
        "--set",
        "sigma=0.25",
        "--set",
        "n=300",
        "--out",
        tmp_path / "certified",
    ]
    where = ["--data", "mnist", "--data-root", tmp_path / "data", "--stride", "8"]
    command(monkeypatch, "certify", "--model", f"zoo:{LATENT}", *where, *options)
    add_evidence(folder, tmp_path / "certified")
    found = manifest.read(folder)
    acr = next(result for result in found.results if result.metric == "acr")
    assert (acr.certifier, acr.sigma, acr.n, acr.images, str(acr.guarantee)) == ("latent", 0.25, 300, 5, "probabilistic")
    assert acr.value > 0.0
    report = verify(folder, data_root=tmp_path / "data")
    assert report.problems == []
    assert report.rerun == ["latent on 3 inputs"]
    text = cards.write_card(folder).read_text()
    assert "--method latent --set split=encoder" in text
    assert "| latent | sigma in the latent 0.25, n 300, alpha 0.001 |" in text
    assert f"ACR {cards.shown(acr)} by latent (sigma in the latent 0.25, n 300" in cards.write_table(shop).read_text()
    assert (shop / "curves-mnist.png").is_file()
    # A changed Lipschitz constant changes the radii, and that is seen without the model.
    records = folder / "records" / "latent" / "records.jsonl"
    records.write_text(records.read_text().replace('"lipschitz":1.', '"lipschitz":2.'))
    assert verify(folder, quick=True).problems != []


@pytest.mark.slow
def test_a_video_model_gets_into_the_zoo(tmp_path, shop):
    from rsplugins.data.table import table_of

    changes = {"training.epochs": 4, "training.ema": 0.0, "schedule.warmup": 1}
    recipe = load_recipe(RECIPES / f"{VIDEO}.toml", changes)
    test = table_of(rsplugins.load_data("moving-digits"), 8)
    trainer = Trainer(recipe, tmp_path / "run", device="cpu", quiet=True, train=test, test=test)
    result = trainer.fit()
    assert result.record["input"]["shape"] == [1, 32, 16, 16]
    assert result.metrics[-1]["test_accuracy"] > 0.25  # twice what guessing gets
    classifier, data = store(result, trainer.test, tmp_path / "stored"), rsplugins.load_data("moving-digits")
    rsplugins.certify(classifier, data, "predict", out=tmp_path / "stored/runs/predict", progress=False)
    place = tmp_path / "stored/runs/gaussian"
    rsplugins.certify(classifier, data, "gaussian", out=place, indices=data.select(stride=500), n=100, progress=False)
    folder = add_trained(tmp_path / "stored", shop)
    report = verify(folder)
    assert report.problems == []
    assert report.rerun == ["predict on 64 inputs", "gaussian on 2 inputs"]
    assert "1 x 32 x 16 x 16" in cards.write_card(folder).read_text()
    assert cards.write_table(shop).is_file()
    assert (shop / "curves-moving-digits.png").is_file()
    clip = table_of(rsplugins.data.load("moving-digits:16", split="test"), 8).images[:2]
    assert rsplugins.load(f"zoo:{VIDEO}").module(clip).shape == (2, 8)
