"""Splits that stay on disk: the same batches as from memory, for any number of workers, and errors that name the file."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsplugins.data import Dataset, load, streamed
from rsplugins.data.streamed import fits, window
from rsplugins.data.table import as_float
from rsplugins.errors import InputValueError, ParameterError, RunError, UnreadableInputError, UsageError
from rsplugins.machine.ranks import Ranks
from rsplugins.training import StreamedTable, Trainer, hookimpl, splits
from rsplugins.training.recipe import DataSettings, to_toml
from rsplugins.training.splits import open_table
from rsplugins.training.trainer import accuracy
from tests.training.cases import recipe

SIZE = (3, 12, 12)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """ImageNet's layout, photographs of many sizes: 12 and 6 of three classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for wnid in ("n01440764", "n01443537", "n01484850"):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (*random.integers(14, 40, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / wnid / f"{wnid}_{number}.JPEG")
    return root


def settings(**data):
    own = DataSettings(name="imagenet", input_size=SIZE, flip=True, **data)
    return dataclasses.replace(recipe(batch_size=4), data=own)


def trainer(out, root, hooks=(), **data):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten())
    network.append(torch.nn.Linear(4 * 12 * 12, 1000))
    changed = dataclasses.replace(settings(**data), model=dataclasses.replace(settings().model, mean=None, std=None))
    return Trainer(changed, out, data_root=root, module=network, hooks=hooks, device="cpu", quiet=True)


def outcome(result):
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in result.metrics]
    return rows, [value.tolist() for value in result.classifier.state_dict().values()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_equals_a_resident_one_bit_for_bit(tmp_path, photos, workers):
    resident = trainer(tmp_path / "resident", photos, crop=2, resident=True)
    there = trainer(tmp_path / "streamed", photos, crop=2, resident=False, workers=workers)
    assert not isinstance(resident.train, StreamedTable)
    assert isinstance(there.train, StreamedTable)
    assert isinstance(there.test, StreamedTable)
    assert outcome(resident.fit()) == outcome(there.fit())


class Cut:
    """Ends the run at a step, as a kill would."""

    def __init__(self, at):
        self.left = at

    @hookimpl
    def instance_weights(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_in_an_epoch_goes_on_with_other_workers(tmp_path, photos):
    whole = trainer(tmp_path / "whole", photos, scale=(0.3, 1.0), workers=2).fit()
    cut = trainer(tmp_path / "cut", photos, [Cut(4)], scale=(0.3, 1.0), workers=1)
    cut.checkpoint_seconds = 0.0
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    state = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert outcome(trainer(tmp_path / "cut", photos, scale=(0.3, 1.0), workers=0).fit()) == outcome(whole)
    with pytest.raises(UsageError, match=r"scale = \[0.3, 1.0\]; \+ scale = \[0.4, 1.0\]"):
        trainer(tmp_path / "cut", photos, scale=(0.4, 1.0)).fit()


def test_windows_depend_on_seed_and_index_and_not_on_workers_or_place_in_a_batch(photos):
    def read(workers, indices, seed):
        table = StreamedTable(load("imagenet", root=photos, split="train", input_size=SIZE), workers=workers, scale=(0.2, 1.0))
        batches = list(table.batches(indices.split(4), seed))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    order, state = torch.randperm(12, generator=torch.Generator().manual_seed(1)), torch.get_rng_state()
    images, labels = read(0, order, 5)
    assert (images.shape, images.dtype, labels.tolist()) == ((12, *SIZE), torch.uint8, (order // 4).tolist())
    for workers in (1, 2):
        assert torch.equal(images, read(workers, order, 5)[0])
    assert torch.equal(images, read(0, torch.arange(12), 5)[0][order])
    assert all(not torch.equal(a, b) for a, b in zip(images, read(0, order, 6)[0], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    data = load("imagenet", root=photos, split="train", input_size=SIZE)
    data.original = lambda index: load("imagenet", root=photos, split="train").original(0)
    alike, _ = next(StreamedTable(data, workers=0, scale=(0.2, 1.0)).batches([torch.arange(4)], 5))
    assert len({tuple(image.flatten().tolist()) for image in alike}) == 4
    prepared = load("imagenet", root=photos, split="train", input_size=SIZE)
    plain, _ = read(2, order, None)
    assert torch.equal(as_float(plain), torch.stack([prepared[int(index)][0] for index in order]))


@pytest.mark.parametrize("frames", [0, 3])
def test_a_window_is_a_part_of_the_image_with_the_area_and_aspect_asked_for(frames):
    # Brightness is the position, so each window says where it was cut.
    height, width, size = 200, 240, 64
    rows, columns = torch.meshgrid(torch.arange(height) / 255.0, torch.arange(width) / 255.0, indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(height, width)])
    image = image[:, None].repeat(1, frames, 1, 1) if frames else image
    areas, aspects = [], []
    for seed in range(60):
        cut = window(image, (3, size, size), (0.25, 0.75), seed)
        assert cut.dtype == torch.uint8
        if frames:
            assert all(torch.equal(cut[:, frame], cut[:, 0]) for frame in range(frames))
            cut = cut[:, 0]
        middle = cut[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4].double()
        high = float((middle[0, -1] - middle[0, 0]).mean()) * size / (size // 2 - 1)
        wide = float((middle[1, :, -1] - middle[1, :, 0]).mean()) * size / (size // 2 - 1)
        assert not cut[2].any()
        areas.append(high * wide / (height * width))
        aspects.append(wide / high)
    assert 0.23 < min(areas) < 0.35
    assert 0.65 < max(areas) < 0.78
    assert 0.72 < min(aspects) < 0.85 < 1.2 < max(aspects) < 1.38


def test_accuracy_takes_a_streamed_split(tmp_path, photos):
    run = trainer(tmp_path / "run", photos, resident=True, scale=None)
    classifier = run.engine.classifier.eval()
    tables = [run.test, StreamedTable(load("imagenet", root=photos, split="val", input_size=SIZE), workers=2)]
    assert accuracy(classifier, tables[0], 4) == accuracy(classifier, tables[1], 4)
    index = torch.tensor([5, 0, 3])
    for here, there in zip(tables[0].take(index), tables[1].take(index), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_no_process_stays(tmp_path, workers):
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (12, 12)).save(tmp_path / "pets" / kind / f"{number}.png")
    (tmp_path / "pets/dog/2.png").write_bytes(b"<html>")
    table = StreamedTable(load("folder:pets", root=tmp_path, input_size=SIZE), workers=workers)
    with pytest.raises(UnreadableInputError, match=r"dog/2\.png is not a readable image"):
        list(table.batches(torch.arange(8).split(2)))
    assert not multiprocessing.active_children()
    with pytest.raises(UnreadableInputError, match=r"dog/2\.png"):
        table.take(torch.tensor([6]))


def made(read, count=8, **more):
    return Dataset(name="made", split="train", labels=[index % 3 for index in range(count)], read=read, **more)


def test_other_failures_name_the_input_or_the_likely_cause():
    def torn(index):
        if index == 5:
            raise ValueError("not enough image data")
        return torch.zeros(1, 4, 4)

    with pytest.raises(UnreadableInputError, match=r"Input 5 of made \(train\).*not enough image data"):
        list(StreamedTable(made(torn), workers=1).batches(torch.arange(8).split(4)))
    killed = made(lambda index: os.kill(os.getpid(), signal.SIGKILL), input_size=(1, 4, 4))
    with pytest.raises(RunError, match="workers") as caught:
        list(StreamedTable(killed, workers=1).batches(torch.arange(8).split(4)))
    assert caught.value.__cause__ is not None
    with pytest.raises(InputValueError, match="several sizes"):
        list(StreamedTable(made(lambda index: torch.zeros(1, 4 + index, 4)), workers=0).batches(torch.arange(8).split(4)))
    with pytest.raises(InputValueError, match="outside"):
        list(StreamedTable(made(lambda index: torch.full((1, 4, 4), 2.0)), workers=0).batches(torch.arange(8).split(4)))
    with pytest.raises(InputValueError, match="Label 2 of input 2"):
        StreamedTable(made(torn, num_classes=2))
    with pytest.raises(InputValueError, match="empty"):
        StreamedTable(made(torn, count=0))


def test_what_fits_is_decided_from_one_image(monkeypatch, photos):
    read = []
    data = made(lambda index: read.append(index) or torch.zeros(3, 100, 100), count=1000)  # 30 MB in bytes
    for limit, expected in ((31 * 10**6, True), (29 * 10**6, False)):
        monkeypatch.setattr(streamed, "LIMIT", limit)
        assert fits(data) is expected
    monkeypatch.setattr(streamed, "LIMIT", 31 * 10**6)
    monkeypatch.setattr(streamed, "_free_memory", lambda: 59 * 10**6)
    assert not fits(data)
    assert read == [0, 0, 0]
    monkeypatch.setattr(splits, "table_of", lambda *arguments, **more: pytest.fail("all images were read"))
    assert isinstance(open_table(settings(scale=(0.3, 1.0)).data, "train", photos, windows=True), StreamedTable)
    monkeypatch.setattr(streamed, "LIMIT", 100)
    assert isinstance(open_table(settings().data, "train", photos), StreamedTable)


MEMORY = """
import os, sys, torch
from pathlib import Path
from rsplugins.data import Dataset
from rsplugins.data.streamed import StreamedTable
from rsplugins.data.table import table_of

def used():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def read(index):
    return torch.full((3, 224, 224), (index % 7) / 255)

torch.set_num_threads(1)
data = Dataset(name="made", split="train", labels=[index % 3 for index in range(400)], read=read)  # 60 MB in bytes
list(StreamedTable(data, workers=0).batches(torch.arange(20).split(20)))
before = peak = used()
if sys.argv[1] == "streamed":
    for images, _ in StreamedTable(data, workers=0).batches(torch.arange(400).split(20)):
        assert len(images) == 20
        peak = max(peak, used())
else:
    kept = table_of(data, num_classes=3)
    assert len(kept) == 400
    peak = used()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_data():
    # In processes of their own: what other tests have freed, the allocator gives out again, and nothing would grow.
    def grown(kind):
        finished = subprocess.run([sys.executable, "-c", MEMORY, kind], capture_output=True, text=True, check=True, timeout=600)
        return int(finished.stdout)

    assert grown("streamed") < 25e6
    assert grown("resident") > 50e6


def test_each_rank_reads_its_own_share(tmp_path, photos):
    run = trainer(tmp_path, photos, resident=False, workers=0)
    read = []
    own = run.train.dataset
    run.train.dataset = made(lambda index: read.append(index) or own[index][0], count=12)
    whole = run.order(0).view(3, 4)
    run.ranks = Ranks(1, 2)
    list(run.train.batches(run.shares(0)))
    assert read == whole[:, 2:].flatten().tolist()


def test_data_sets_that_are_streamed_can_be_sent_to_a_process(photos):
    data = load("imagenet", root=photos, split="train", input_size=(1, 12, 12))
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent[3][0], data[3][0])
    assert data.original(3).shape[0] == 1
    assert data.original(3).shape != data[3][0].shape


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"scale": (0.3, 1.0)}, "no input_size"),
        ({"scale": (0.3, 1.0), "input_size": SIZE, "resident": True}, "resident = true"),
        ({"scale": (1.0, 0.3), "input_size": SIZE}, "smaller share first"),
        ({"scale": (0.0, 1.0), "input_size": SIZE}, "above 0"),
        ({"resident": "auto"}, "true or false"),
        ({"workers": -1}, "at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, text):
    with pytest.raises(ParameterError, match=text):
        DataSettings(name="imagenet", **data)


def test_recipes_that_say_nothing_of_streaming_keep_their_text():
    assert not any(word in to_toml(recipe()) for word in ("scale", "resident", "workers"))
    machine = dataclasses.replace(settings(), data=dataclasses.replace(settings().data, resident=False, workers=3))
    assert machine.identity() == to_toml(settings())
