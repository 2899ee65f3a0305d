"""The recipes of data sets that are not shipped, run by `rsplugins train` on small fixtures in each data set's own layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsplugins.cli import main
from rsplugins.data import load
from rsplugins.models import manifest
from rsplugins.training import load_recipe

ZOO = Path(__file__).resolve().parents[2] / "zoo"
WITHOUT = [folder.parent for folder in sorted(ZOO.glob("*/manifest.toml")) if manifest.read(folder.parent).no_weights]


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def imagenet(root):
    for split, count in (("train", 3), ("val", 1)):
        for wnid in ("n01443537", "n15075141"):
            for number in range(count):
                picture(root / split / wnid / f"{wnid}_{number}.JPEG", number)


def places365(root):
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/airplane_cabin 1\n/z/zen_garden 2\n")
    train = [("/a/airfield", 0), ("/a/airplane_cabin", 1), ("/z/zen_garden", 2), ("/a/airfield", 0)]
    lines = []
    for number, (folder, label) in enumerate(train):
        picture(root / "data_256_standard" / folder[1:] / f"0000000{number}.jpg", number)
        lines.append(f"{folder}/0000000{number}.jpg {label}\n")
    (root / "places365_train_standard.txt").write_text("".join(lines))
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 2\nPlaces365_val_00000002.jpg 0\n")
    for number in (1, 2):
        picture(root / "val_256" / f"Places365_val_0000000{number}.jpg", number)


def ucf101(root):
    av = pytest.importorskip("av")
    names = [f"{kind}/v_{kind}_g0{group}_c01.avi" for kind in ("Archery", "Biking") for group in (1, 2, 3)]
    for number, name in enumerate(names):
        path = root / "UCF-101" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
            for frame in range(18):
                pixels = np.full((40, 48, 3), (40 * number + frame) % 256, dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    (lists / "trainlist01.txt").write_text(
        "".join(f"{name} {1 + (number > 2)}\n" for number, name in enumerate(names) if number % 3)
    )
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for number, name in enumerate(names) if number % 3 == 0))


SMALL = {
    "imagenet": (imagenet, "[3, 32, 32]", 1000),
    "places365": (places365, "[3, 32, 32]", 3),
    "ucf101": (ucf101, "[3, 8, 32, 32]", 2),
}


def test_each_of_the_data_sets_has_a_model_that_says_which_data_it_needs():
    found = {manifest.read(folder).recipe.data.partition(":")[0]: manifest.read(folder) for folder in WITHOUT}
    assert found.keys() == SMALL.keys()
    for read in found.values():
        assert "was not there to train on" in read.no_weights
        assert "--data-root DIR" in read.no_weights


@pytest.mark.parametrize("folder", WITHOUT, ids=[folder.name for folder in WITHOUT])
def test_the_recipe_trains_on_the_data_sets_own_layout(folder, tmp_path, monkeypatch):
    recipe = load_recipe(folder / "recipe.toml")
    assert recipe == load_recipe(ZOO / "recipes" / f"{folder.name}.toml")
    assert recipe.data.scale is not None  # so that the training split is streamed
    make, size, classes = SMALL[recipe.data.name.partition(":")[0]]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    small = [f"data.input_size={size}", "training.epochs=1", "training.batch_size=4", "schedule.name=constant"]
    small += ["schedule.milestones=[]", "schedule.warmup=0"]
    words = ["train", str(folder / "recipe.toml"), "--out", str(tmp_path / "run"), "--data-root", str(root), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rsplugins", *words, *(word for value in small for word in ("--set", value))])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["status"], record["architecture"]["num_classes"]) == ("finished", classes)
    assert record["images"]["train"] >= 4
    assert record["last_epoch"]["loss"] > 0
    data = load(recipe.data.name, root=root, split=recipe.data.test, input_size=record["input"]["shape"])
    assert record["images"]["test"] == len(data)
