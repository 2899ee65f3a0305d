"""The calls of the front door as a newcomer makes them: runs on disk, one's own data, attacks, and what is refused in words."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import rsplugins
from rsplugins import certification
from rsplugins.data import Dataset
from rsplugins.errors import InputValueError, ParameterError, PluginUnavailableError, RunError, UsageError

SETTINGS = {"sigma": 0.25, "n0": 20, "n": 500}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 3)
    linear.weight.data *= 4
    return rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), linear), input_size=(3, 2, 2), num_classes=3)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def data(images):
    return Dataset.from_arrays(images, [0, 1, 2, 0, 1, 2])


def claims(certificates):
    return [(one.index, one.prediction, one.radius, one.evidence, one.function, one.parameters) for one in certificates]


@pytest.mark.parametrize("method", ["gaussian", "ibp"])
def test_a_run_gives_the_certificates_of_the_batch_in_memory(classifier, images, data, tmp_path, method):
    settings = SETTINGS if method == "gaussian" else {}
    run = rsplugins.certify(classifier, data, method, out=tmp_path / "x", progress=False, **settings)
    again = rsplugins.open_run(str(tmp_path / "x"))
    in_memory = rsplugins.certify(classifier, images, method, **settings)
    assert claims(run.certificates()) == claims(again.certificates()) == claims(in_memory)
    assert claims(rsplugins.certify(classifier, data, method, **settings)) == claims(in_memory)
    assert run.labels == [0, 1, 2, 0, 1, 2]
    scored = rsplugins.score(run.certificates(), run.labels)
    summary = again.summary()
    assert {key: summary[key] for key in ("acr", "accuracy", "guarantee")} == {
        key: scored[key] for key in ("acr", "accuracy", "guarantee")
    }


def test_the_same_call_resumes_and_another_is_refused(classifier, data, tmp_path, capsys):
    first = rsplugins.certify(classifier, data, "gaussian", out=tmp_path, indices=[1, 4], **SETTINGS)
    assert "gaussian" in capsys.readouterr().err
    before = (tmp_path / "records.jsonl").read_bytes()
    again = rsplugins.certify(classifier, data, "gaussian", out=tmp_path, indices=[1, 4], **SETTINGS)
    assert (tmp_path / "records.jsonl").read_bytes() == before
    assert claims(first.certificates()) == claims(again.certificates())
    assert [one.index for one in again.certificates()] == [1, 4]
    with pytest.raises(UsageError, match=r"sigma: 0.25 -> 0.5"):
        rsplugins.certify(classifier, data, "gaussian", out=tmp_path, indices=[1, 4], **{**SETTINGS, "sigma": 0.5})


def test_other_pixels_are_another_run_wherever_they_differ(classifier, tmp_path):
    pixels, labels = np.full((40, 3, 2, 2), 0.5), [0] * 40
    rsplugins.certify(classifier, Dataset.from_arrays(pixels, labels), "ibp", out=tmp_path, indices=[1])
    other = pixels.copy()
    other[1] = 0.75  # not among the evenly spaced images whose pixels enter the fingerprint of data on disk
    with pytest.raises(UsageError, match="data"):
        rsplugins.certify(classifier, Dataset.from_arrays(other, labels), "ibp", out=tmp_path, indices=[1])


def test_a_reference_is_loaded_for_the_model(tmp_path):
    classifier = rsplugins.load("zoo:digits-cnn.digits-gaussian025-v2")
    run = rsplugins.certify(classifier, "digits", "gaussian", out=tmp_path, indices=[0, 9], **SETTINGS)
    assert json.loads((tmp_path / "manifest.json").read_text())["data"]["reference"] == "digits"
    data = rsplugins.load_data("digits")
    assert run.labels == [data[0][1], data[9][1]]


def test_an_edited_run_gives_no_certificates(classifier, data, tmp_path):
    rsplugins.certify(classifier, data, "gaussian", out=tmp_path, **SETTINGS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["parameters"]["sigma"] = 2.5
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    run = rsplugins.open_run(tmp_path)
    assert run.summary()["certifies"] is False
    for call in (run.certificates, run.to_pandas):
        with pytest.raises((RunError, PluginUnavailableError), match=r"edited|pandas"):
            call()
    with pytest.raises(RunError, match="edited"):
        run.certificates()


def test_a_data_frame_has_a_row_an_input(classifier, data, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    run = rsplugins.certify(classifier, data, "gaussian", out=tmp_path, **SETTINGS)
    frame = run.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.tolist() == list(range(6))
    assert frame["radius"].tolist() == [one.radius for one in run.certificates()]
    assert set(frame["guarantee"]) == {"probabilistic"}
    assert frame["correct"].mean() == run.summary()["accuracy"]


def test_without_pandas_the_data_frame_says_so(classifier, data, tmp_path, monkeypatch):
    run = rsplugins.certify(classifier, data, "ibp", out=tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PluginUnavailableError, match="pip install pandas"):
        run.to_pandas()


@pytest.mark.parametrize("convert", [np.asarray, list, tuple, lambda x: [each.numpy() for each in x], lambda x: x.numpy()[:]])
def test_images_in_memory_are_taken_in_the_forms_people_hold(classifier, images, convert):
    found = rsplugins.certify(classifier, convert(images), "ibp")
    assert claims(found) == claims(rsplugins.certify(classifier, images, "ibp"))


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 2, 2), 0


def _torch(images):
    return TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (_torch, "rsplugins.data.Dataset.from_torch"),
        (lambda images: DataLoader(_torch(images)), r"rsplugins.data.Dataset.from_torch\(LOADER.dataset\)"),
        (lambda images: Stream(), r"rsplugins.data.Dataset.from_arrays\(torch.stack\(images\), labels\)"),
        (lambda images: [images, images], r"torch.cat\(images\)"),
        (lambda images: [torch.zeros(3, 2, 2), torch.zeros(3, 4, 4)], r"torch.stack\(images\)"),
        (lambda images: [], "at least one image"),
        (lambda images: {"image": images}, r"torch.as_tensor\(images"),
        (lambda images: (images * 255).byte().numpy(), r"images.float\(\) / 255"),
    ],
)
def test_other_forms_are_refused_with_the_line_that_converts_them(classifier, images, make, line):
    with pytest.raises(InputValueError, match=line):
        rsplugins.certify(classifier, make(images), "ibp")


def test_images_alone_are_no_run(classifier, images, tmp_path):
    with pytest.raises(UsageError, match=r"Dataset.from_arrays\(images, labels\)"):
        rsplugins.certify(classifier, images, "ibp", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("indices", [[], [6], [0, 0], [-1]])
def test_indices_outside_the_data_are_refused(classifier, data, indices):
    with pytest.raises(ParameterError, match="indices"):
        rsplugins.certify(classifier, data, "ibp", indices=indices)


def test_arrays_are_kept_as_they_are_and_bytes_divided(images):
    data = Dataset.from_arrays(images.numpy(), np.arange(6), classes=list("abcdef"))
    assert torch.equal(torch.stack([image for image, _ in data]), images)
    assert (data.num_classes, data.classes, data.labels.tolist()) == (6, tuple("abcdef"), list(range(6)))
    eight = Dataset.from_arrays(np.full((2, 1, 4, 4), 51, dtype=np.uint8), [0, 1])
    assert eight[0][0].unique().tolist() == [torch.tensor(51 / 255).item()]
    assert "255" in eight.preparation
    assert eight.fingerprint() != Dataset.from_arrays(np.full((2, 1, 4, 4), 52, dtype=np.uint8), [0, 1]).fingerprint()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1], "shape"),
        (np.eye(6), "one-hot"),
        (np.array([0, 1, 2, 0, 1, np.nan]), "whole numbers"),
        (np.arange(6.0), r"astype\(int\)"),
        ([0, 1, 2, 0, 1, -1], "image 5 is -1"),
        ([0, 1, 2, 0, 1, 3], "image 5 is 3"),
        (list("abcabc"), "index of the class"),
    ],
)
def test_labels_that_are_no_classes_are_refused(images, labels, words):
    with pytest.raises(ParameterError, match=words):
        Dataset.from_arrays(images, labels, num_classes=3)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 8, 8, 3)), "permute"),
        (np.full((2, 3, 8, 8), 255.0), "Divide by 255"),
        (np.full((2, 3, 8, 8), -2.0), "normalised twice"),
        (np.full((2, 3, 8, 8), np.nan), "not finite"),
        (np.zeros((0, 3, 8, 8)), "no images"),
    ],
)
def test_arrays_that_are_no_raw_images_are_refused(pixels, words):
    with pytest.raises(InputValueError, match=words):
        Dataset.from_arrays(pixels, [0] * len(pixels))


class Pictures(torch.utils.data.Dataset):
    """As torchvision's: Pillow pictures, ``targets``, ``classes`` and a transform."""

    def __init__(self, transform=None, target_transform=None):
        generator = np.random.default_rng(0)
        self.pixels = generator.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
        self.targets, self.classes = [2, 0, 1, 1, 0], ["cat", "dog", "owl"]
        self.transform, self.target_transform = transform, target_transform

    def __len__(self):
        return 5

    def __getitem__(self, index):
        from PIL import Image

        image, label = Image.fromarray(self.pixels[index]), self.targets[index]
        image = image if self.transform is None else self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)


def test_torch_data_sets_give_raw_images_and_their_labels():
    from torchvision.transforms import ToTensor

    pictures = Pictures()
    expected = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).float() / 255
    for source in (pictures, Pictures(ToTensor())):
        data = Dataset.from_torch(source)
        assert (data.name, data.classes, data.labels.tolist()) == ("Pictures", ("cat", "dog", "owl"), pictures.targets)
        assert torch.equal(torch.stack([image for image, _ in data]), expected)
    part = Dataset.from_torch(Subset(pictures, [4, 2]), num_classes=3)
    assert (part.labels.tolist(), part.num_classes) == ([0, 1], 3)
    turned = Dataset.from_torch(Pictures(target_transform=lambda label: 2 - label))
    assert turned.labels.tolist() == [0, 2, 1, 1, 2]


def test_a_random_or_normalising_transform_is_refused():
    from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

    torch.manual_seed(0)
    with pytest.raises(ParameterError, match="random transform"):
        Dataset.from_torch(Pictures(Compose([RandomCrop(4, padding=3), ToTensor()])))
    with pytest.raises(InputValueError, match="Normalize"):
        Dataset.from_torch(Pictures(Compose([ToTensor(), Normalize([0.5] * 3, [0.2] * 3)])))


@pytest.mark.parametrize(
    ("given", "line"), [(DataLoader(Pictures()), "LOADER.dataset"), (Stream(), "from_arrays"), (3, "from_arrays")]
)
def test_what_is_no_indexed_data_set_is_refused(given, line):
    with pytest.raises(ParameterError, match=line):
        Dataset.from_torch(given)


def test_an_item_that_changes_its_label_fails_in_the_run_and_is_said(classifier, images, tmp_path):
    class Moody(TensorDataset):
        later = False

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, (label + 1) % 3 if self.later and index == 1 else label

    moody = Moody(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    data = Dataset.from_torch(moody)
    moody.later = True
    run = rsplugins.certify(classifier, data, "ibp", out=tmp_path, indices=[0, 1])
    assert [row.failed for row in run.rows] == [False, True]
    assert "was 1 and is 2" in run.rows[1].record.error


def test_an_attack_on_a_linear_model_breaks_what_its_margin_says(classifier, images):
    logits = classifier(images)
    labels = logits.argmax(1)
    weight = classifier.module[1].weight.detach()
    eps = 0.02
    # The worst change of z_y - z_k in the l-infinity ball, without the clipping to [0, 1] that only helps the defender.
    fall = eps * (weight[labels][:, None] - weight[None]).abs().sum(2)
    margins = logits.gather(1, labels[:, None]) - logits
    safe = (margins - fall).masked_fill(torch.nn.functional.one_hot(labels, 3).bool(), 1).amin(1) > 0
    found = rsplugins.attack(classifier, images, labels, eps=eps, autoattack=())
    assert {str(one.guarantee) for one in found} == {"empirical"}
    assert all(one.radius == eps for one, right in zip(found, safe.tolist(), strict=True) if right)
    broken = rsplugins.attack(classifier, images, (labels + 1) % 3, eps=eps, autoattack=())
    assert all(one.radius == 0 for one in broken)
    wide = rsplugins.attack(classifier, images, labels, eps=0.5, autoattack=())
    assert any(one.radius == 0 for one in wide)
    scored = rsplugins.score(found, labels, radii=[0.0, eps])
    assert scored["certifies"] is False
    with pytest.raises(ParameterError, match="labels"):
        rsplugins.attack(classifier, images, labels[:2], eps=eps)


def test_every_name_of_the_public_door_is_there_and_documented():
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    for name in rsplugins.__all__:
        assert getattr(rsplugins, name) is not None
        assert f"`{name}`" in page or f"`rsplugins.{name}" in page, f"docs/python.md does not name {name}"


def test_processes_of_torchrun_share_one_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, rsplugins\n"
        "classifier = rsplugins.load('zoo:digits-cnn.digits-gaussian025-v2')\n"
        "settings = dict(sigma=.25, n0=10, n=100, indices=range(7), progress=False)\n"
        "run = rsplugins.certify(classifier, 'digits', 'gaussian', out='x', **settings)\n"
        "open('rank' + os.environ['RANK'], 'w').write(f'{len(run.rows)} {len(run.missing)}')\n"
    )
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rsplugins.__file__).parents[1])}
    done = subprocess.run(launched, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["7 0"] * 2
    alone = rsplugins.certify(
        rsplugins.load("zoo:digits-cnn.digits-gaussian025-v2"), "digits", "gaussian", sigma=0.25, n0=10, n=100, indices=range(7)
    )
    together = rsplugins.open_run(tmp_path / "x").certificates()
    assert [(one.index, one.radius, one.evidence) for one in together] == [(one.index, one.radius, one.evidence) for one in alone]


ROOT = Path(rsplugins.__file__).parents[1]
ROOMS = ("data", "lipschitz", "sampling", "statistics", "testing", "training")
"""Rooms whose ``__all__`` is public besides the names of ``rsplugins`` itself, as docs/python.md says."""
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


def programs():
    """The programs that users read and copy: (where, source)."""
    yield from ((path.name, path.read_text()) for path in sorted((ROOT / "examples").rglob("*.py")))
    for page in PAGES:
        yield from ((page.name, block) for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
        yield from ((page.name, line) for line in re.findall(r"^(?:from rsplugins|import rsplugins).*$", page.read_text(), re.M))


def hidden_names(source):
    """What a program takes from this package by another door than the public ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rsplugins":
            names = [("rsplugins", node.attr)]
        else:
            continue
        for module, name in names:
            if module.partition(".")[0] != "rsplugins":
                continue
            room = module.partition(".")[2]
            if (room and room not in ROOMS) or (
                name is not None and not (not room and name in ROOMS) and name not in importlib.import_module(module).__all__
            ):
                yield f"{module}.{name}"


def test_examples_and_documentation_come_in_by_the_public_door():
    assert len(list(programs())) > 20
    wrong = {where: found for where, source in programs() if (found := list(hidden_names(source)))}
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "from rsplugins.runs.execute import execute",
        "import rsplugins.host",
        "import rsplugins\nrsplugins.certification",
        "from rsplugins.sampling import Slots",
    ],
)
def test_the_reader_of_programs_sees_other_doors(source):
    assert list(hidden_names(source))


def test_no_certifier_may_take_a_keyword_of_certify():
    parameters = inspect.signature(rsplugins.certify).parameters
    keywords = {name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    assert keywords == certification._KEYWORDS
