"""Each data set in its own on-disk format, written here byte by byte, and read back."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from rsplugins.data import load
from rsplugins.errors import DataNotFoundError, InputValueError, ParameterError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize(("split", "prefix"), [("test", "t10k"), ("train", "train")])
def test_idx_files(tmp_path, name, folder, split, prefix):
    images = np.random.default_rng(1).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 9, 0], dtype=np.uint8)
    write_idx(tmp_path / folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
    write_idx(tmp_path / folder / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
    data = load(name, root=tmp_path, split=split)
    assert (data.labels.tolist(), data.num_classes, data.input_size) == ([3, 1, 9, 0], 10, (1, 28, 28))
    torch.testing.assert_close(data[2][0], torch.from_numpy(images[2:3].astype(np.float32) / 255))
    with pytest.raises(DataNotFoundError):
        load(name, root=tmp_path, split={"test": "train", "train": "test"}[split])


def test_a_data_set_is_found_in_its_own_folder_and_through_the_environment(tmp_path, monkeypatch):
    for part, array in (("images-idx3", np.zeros((1, 28, 28), np.uint8)), ("labels-idx1", np.zeros(1, np.uint8))):
        write_idx(tmp_path / "mnist" / "MNIST" / "raw" / f"t10k-{part}-ubyte", array)
    monkeypatch.setenv("RSPLUGINS_DATA", str(tmp_path))
    assert len(load("mnist")) == 1


@pytest.mark.parametrize(
    ("name", "folder", "file", "key", "meta", "names"),
    [
        ("cifar10", "cifar-10-batches-py", "test_batch", "labels", "batches.meta", "label_names"),
        ("cifar100", "cifar-100-python", "test", "fine_labels", "meta", "fine_label_names"),
    ],
)
def test_cifar_pickles(tmp_path, pixels, name, folder, file, key, meta, names):
    (tmp_path / folder).mkdir()
    rows = pixels.transpose(0, 3, 1, 2).reshape(6, -1)
    # Protocol 2, as Python 2 wrote the published files.
    (tmp_path / folder / file).write_bytes(pickle.dumps({"data": rows, key: [5, 0, 1, 2, 9, 7]}, protocol=2))
    (tmp_path / folder / meta).write_bytes(pickle.dumps({names: [f"class {i}" for i in range(10)]}, protocol=2))
    data = load(name, root=tmp_path)
    assert (data.labels.tolist(), data.classes[3], data.input_size) == ([5, 0, 1, 2, 9, 7], "class 3", (3, 32, 32))
    torch.testing.assert_close(data[4][0].permute(1, 2, 0).mul(255).byte(), torch.from_numpy(pixels[4]))
    assert f"not the published files: {file}" in data.describe()["preparation"]


def test_cifar_batches_are_read_without_running_what_is_in_them(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in ("test_batch", "batches.meta"):
        (folder / file).write_bytes(pickle.dumps({"labels": [Evil()]}))
    with pytest.raises(InputValueError, match="it wants to call"):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "run").exists()


def test_svhn_mat(tmp_path, pixels):
    labels = np.array([[10], [1], [2], [9], [10], [3]], dtype=np.uint8)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    data = load("svhn", root=tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 9, 0, 3]  # the files call the digit 0 "10"
    torch.testing.assert_close(data[5][0].permute(1, 2, 0).mul(255).byte(), torch.from_numpy(pixels[5]))


def test_imagenet_folders_keep_the_labels_of_imagenet(tmp_path):
    for wnid, size in (("n01443537", (40, 60)), ("n15075141", (64, 32))):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        Image.new("RGB", size, (255, 0, 51)).save(tmp_path / "val" / wnid / f"ILSVRC2012_{wnid}.JPEG", quality=95)
    data = load("imagenet", root=tmp_path, input_size=(3, 28, 28))
    assert (data.labels.tolist(), data.num_classes, data.split, data[0][0].shape) == ([1, 999], 1000, "val", (3, 28, 28))
    torch.testing.assert_close(data[1][0].mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]), atol=0.02, rtol=0)
    assert "short side resized to 32 (bicubic), centre crop 28x28" in data.preparation
    (tmp_path / "val" / "cats").mkdir()
    with pytest.raises(DataNotFoundError, match="cats"):
        load("imagenet", root=tmp_path)


@pytest.mark.parametrize("size", ["256", "large"])
def test_places365_validation_layout(tmp_path, size):
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/a/airplane_cabin 1\n/z/zen_garden 2\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 2\nPlaces365_val_00000002.jpg 0\n")
    (tmp_path / f"val_{size}").mkdir()
    for number in (1, 2):
        Image.new("RGB", (20 * number, 30), (0, 255, 0)).save(tmp_path / f"val_{size}" / f"Places365_val_0000000{number}.jpg")
    data = load("places365", root=tmp_path, input_size=(3, 16, 16))
    assert (data.labels.tolist(), data.classes[2], data.num_classes) == ([2, 0], "/z/zen_garden", 3)
    assert data[1][0].shape == (3, 16, 16)
    assert data.preparation.startswith(f"{size} images; not the published files: categories_places365.txt, places365_val.txt")


def test_any_folder_of_images(tmp_path):
    for name, colour in (("dog", 200), ("cat", 100)):
        (tmp_path / "pets" / "test" / name).mkdir(parents=True)
        Image.new("L", (4, 4), colour).save(tmp_path / "pets" / "test" / name / "b.png")
        Image.new("RGBA", (4, 4), (colour, 0, 0, 9)).save(tmp_path / "pets" / "test" / name / "a.PNG")
    (tmp_path / "pets" / "test" / ".cache").mkdir()
    (tmp_path / "pets" / "test" / "cat" / "notes.txt").write_text("no image")
    data = load("folder:pets", root=tmp_path, alpha="drop")
    assert (data.name, data.split, data.classes, data.labels.tolist()) == ("folder:pets", "test", ("cat", "dog"), [0, 0, 1, 1])
    torch.testing.assert_close(data[2][0], torch.tensor([200 / 255, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
    grey = load(f"folder:{tmp_path / 'pets'}", input_size=(1, 4, 4), alpha="drop")
    torch.testing.assert_close(grey[1][0], torch.full((1, 4, 4), 100 / 255))
    assert data.fingerprint() != grey.fingerprint()


def test_images_are_resized_by_the_short_side_and_cropped_in_the_centre(tmp_path):
    # Left third black, middle third white, right third black: the centre crop of 30x10 at (10, 10) is the white one.
    image = np.zeros((10, 30), dtype=np.uint8)
    image[:, 10:20] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "x.png")
    exact = load(f"folder:{tmp_path}", input_size=(1, 10, 10), crop=1.0)[0][0]
    assert bool((exact == 1).all())
    half = load(f"folder:{tmp_path}", input_size=(1, 5, 5), crop=1.0)[0][0]
    assert half.shape == (1, 5, 5)
    assert bool((half[0, :, 1:4] > 0.95).all())


def test_folders_that_hold_nothing_say_so(tmp_path):
    (tmp_path / "flat.png").write_bytes(b"")
    with pytest.raises(DataNotFoundError, match=r"CLASS/IMAGE\.png"):
        load(f"folder:{tmp_path}")
    with pytest.raises(DataNotFoundError, match="unpack it first"):
        load(f"folder:{tmp_path / 'flat.png'}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"<html>")
    with pytest.raises(InputValueError, match=r"broken\.png is not a readable image"):
        load(f"folder:{tmp_path}")[0]
    with pytest.raises(ParameterError, match="video"):
        load(f"folder:{tmp_path}", input_size=(3, 8, 16, 16))


@pytest.mark.parametrize(
    "name", ["mnist", "fashion-mnist", "svhn", "cifar10", "cifar100", "imagenet", "places365", "folder:there"]
)
def test_missing_data_say_what_where_and_how(tmp_path, name):
    with pytest.raises(DataNotFoundError) as caught:
        load(name, root=tmp_path)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(tmp_path) in text
    assert "looked for" in text
    assert "--data-root" in text
    assert "download" in text.lower() or "Check the path" in text or "Get ILSVRC2012" in text


def test_images_of_another_size_than_the_model_takes_are_refused(tmp_path):
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", np.zeros((1, 28, 28), np.uint8))
    write_idx(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", np.zeros(1, np.uint8))
    assert len(load("mnist", root=tmp_path, input_size=(1, 28, 28))) == 1
    with pytest.raises(ParameterError, match=r"resize=\(32, 32\)"):
        load("mnist", root=tmp_path, input_size=(3, 32, 32))


@needs_shared
def test_the_real_mnist():
    data = load("mnist", root=SHARED)
    assert len(data) == 10_000
    assert np.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    mean = float(torch.stack([data[index][0] for index in data.select(stride=5)]).mean())
    assert mean == pytest.approx(0.1325, abs=0.004)  # 0.1325 over the whole test split
    assert len(load("mnist", root=SHARED / "mnist", split="train")) == 60_000


@needs_shared
def test_the_real_imagenet_sample(tmp_path):
    import tarfile

    with tarfile.open(SHARED / "imagenet-sample.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(("val/n01440764", "val/n02123045"))]
        archive.extractall(tmp_path, members=members, filter="data")
    data = load("imagenet", root=tmp_path, input_size=(3, 224, 224))
    assert (data.labels.tolist(), data[1][0].shape) == ([0, 281], (3, 224, 224))  # tench, tabby cat
