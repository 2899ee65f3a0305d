"""Training in bfloat16 on a CPU: only where its gradients are right."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsplugins.classifier import Classifier
from rsplugins.errors import UsageError
from rsplugins.training import Trainer
from rsplugins.training import precision as precisions
from rsplugins.training.precision import has_bfloat16, unsafe_in_bfloat16
from rsplugins.training.smoothing import GaussianAugmentation
from tests.training.cases import recipe, small_net, table

CPU = torch.device("cpu")


def strided(x):
    return F.conv2d(x, torch.ones(4, 1, 3, 3), stride=2, padding=1)


class Functional(nn.Module):
    def forward(self, x):
        return F.conv3d(x[:, None], torch.ones(2, 1, 1, 3, 3), padding=(0, 1, 1)).flatten(1)


class Narrow(nn.Module):
    def forward(self, x):
        return strided(strided(x).mean((1,), keepdim=True)[..., :1]).flatten(1)


@pytest.mark.parametrize(
    ("module", "size", "reason"),
    [
        (small_net(), (1, 4, 4), None),
        (nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Flatten()), (1, 2, 2), None),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 4, 3, padding=1), nn.Flatten()), (1, 3, 3), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2), None),
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten()), (1, 8, 8, 8), "it has three-dimensional convolutions"),
        (Functional(), (1, 4, 4), "it has three-dimensional convolutions"),
        (Narrow(), (1, 4, 4), "a convolution of stride (2, 2) has an input of 2 x 1"),
        (
            nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 4, 3, padding=1, stride=3), nn.Flatten()),
            (1, 1, 2),
            "a convolution of stride (3,) has an input of 2",
        ),
    ],
)
def test_what_cannot_be_trusted_is_seen_in_layers_and_in_functions(module, size, reason):
    classifier = Classifier(module, input_size=size, num_classes=3)
    norm = nn.BatchNorm1d(3)
    classifier.add_module("norm", norm)
    classifier.train()
    norm.eval()
    assert unsafe_in_bfloat16(classifier, CPU) == reason
    assert [classifier.training, module.training, norm.training] == [True, True, False]
    assert unsafe_in_bfloat16(classifier, torch.device("cuda")) is None


def test_looking_leaves_batch_statistics_alone():
    module = small_net(batch_norm=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert unsafe_in_bfloat16(Classifier(module, input_size=(1, 4, 4), num_classes=3).train(), CPU) is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def dirty():
    """Fill freed memory with NaN: what a kernel leaves unwritten shows."""
    junk = [torch.full((size,), float("nan")) for size in (300, 1000, 10_000, 30_000, 100_000, 1_000_000) for _ in range(2)]
    del junk


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_gradients_of_all_other_small_convolutions_are_right(dimensions, kernel):
    # Against float64, whose kernels are others.
    convolve = {1: F.conv1d, 2: F.conv2d}[dimensions]
    tried = 0
    for size, stride in itertools.product(itertools.product((1, 2, 3, 4, 7), repeat=dimensions), (1, 2, 3)):
        if min(size) < stride or min(size) + 2 * (kernel // 2) < kernel:
            continue  # of which the first are the cases not trusted
        generator = torch.Generator().manual_seed(tried)
        x = torch.randn(3, 32, *size, generator=generator).bfloat16()
        weight = (0.1 * torch.randn(32, 32, *[kernel] * dimensions, generator=generator)).bfloat16()
        exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
        scores = convolve(*exact, stride=stride, padding=kernel // 2)
        back = torch.randn(scores.shape, generator=generator).bfloat16()
        scores.backward(back.double())
        for _ in range(2):
            found = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            dirty()
            output = convolve(*found, stride=stride, padding=kernel // 2)
            dirty()
            output.backward(back)
            for name, a, b in zip(("input", "weight"), found, exact, strict=True):
                largest = float((a.grad.double() - b.grad).abs().max() / b.grad.abs().max())
                assert largest < 0.03, f"{name} of {size}, stride {stride}"
        tried += 1
    assert tried >= (9 if dimensions == 1 else 38)


def test_three_dimensional_networks_train_in_float32_on_a_cpu(tmp_path, capsys):
    def run(name, precision):
        still = table(12)
        data = type(still)(still.images[:, :, None].repeat(1, 1, 2, 1, 1), still.labels, 3)
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)
        )
        settings = replace(recipe(epochs=2, precision=precision), name=name)
        dirty()
        return Trainer(
            settings, tmp_path / name, train=data, test=data, module=module, hooks=[GaussianAugmentation(sigma=0.1)], device="cpu"
        ).fit()

    lower, full = run("lower", "bfloat16"), run("full", "float32")
    assert "lower: trains in float32: it has three-dimensional convolutions" in capsys.readouterr().err
    weights = full.classifier.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in lower.classifier.state_dict().items())
    assert json.loads((tmp_path / "lower" / "training.json").read_text())["precision"] == "float32"


def _trainer(out, precision, module=None, **training):
    hooks = [GaussianAugmentation(sigma=0.1)]
    data = {"train": table(), "test": table(), "module": small_net() if module is None else module}
    return Trainer(recipe(**{"epochs": 1, "precision": precision, **training}), out, hooks=hooks, device="cpu", **data)


@pytest.fixture
def units(monkeypatch):
    """Says whether this processor has bfloat16 units, whatever it has."""
    return lambda there: monkeypatch.setattr(precisions, "has_bfloat16", lambda device: there)


def test_the_precision_of_other_networks_is_the_recipes_where_the_processor_has_units_for_it(tmp_path, units):
    units(True)
    for precision in ("bfloat16", "float32"):
        record = _trainer(tmp_path / precision, precision).fit().record
        assert record["precision"] == precision
        assert "precision_reason" not in record


def test_without_units_a_recipe_in_bfloat16_trains_in_float32_and_says_and_records_it(tmp_path, units, capsys):
    units(False)
    lower, full = (_trainer(tmp_path / name, name).fit() for name in ("bfloat16", "float32"))
    assert "test: trains in float32: this processor has no units for bfloat16" in capsys.readouterr().err
    record = json.loads((tmp_path / "bfloat16" / "training.json").read_text())
    assert record["precision"] == "float32"
    assert "no units for bfloat16" in record["precision_reason"]
    assert torch.load(tmp_path / "bfloat16" / "checkpoint.pt", weights_only=True)["engine"]["precision"] == "float32"
    weights = full.classifier.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in lower.classifier.state_dict().items())
    assert full.record["precision"] == "float32"
    assert "precision_reason" not in full.record


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_keeps_the_arithmetic_in_which_it_began(tmp_path, units, first, capsys):
    units(first)
    whole = _trainer(tmp_path / "whole", "bfloat16", epochs=2).fit()
    assert _trainer(tmp_path / "cut", "bfloat16", epochs=2).fit(time_budget=0.0).status == "stopped"
    units(not first)
    capsys.readouterr()
    resumed = _trainer(tmp_path / "cut", "bfloat16", epochs=2).fit()
    began = "bfloat16" if first else "float32"
    assert resumed.record["precision"] == began
    assert f"trains in {began}: the run began in {began}" in capsys.readouterr().err
    weights = whole.classifier.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.classifier.state_dict().items())


def test_a_run_that_began_in_bfloat16_does_not_go_on_where_its_gradients_are_wrong(tmp_path, units, monkeypatch):
    units(True)
    _trainer(tmp_path, "bfloat16", epochs=2).fit(time_budget=0.0)
    monkeypatch.setattr("rsplugins.training.engine.unsafe_in_bfloat16", lambda *_: "it has three-dimensional convolutions")
    monkeypatch.setattr(precisions, "unsafe_in_bfloat16", lambda *_: "it has three-dimensional convolutions")
    with pytest.raises(UsageError, match="began in bfloat16, and here it has three-dimensional"):
        _trainer(tmp_path, "bfloat16", epochs=2).fit()


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("flags\t\t: fpu sse avx2 avx512f avx512bw\n", False),
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 sve\n", True),
        ("Features\t: fp asimd sve\n", False),
        ("", False),
    ],
)
def test_units_are_read_off_what_the_processor_says(cpuinfo, has, monkeypatch, tmp_path):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(precisions, "Path", lambda path: tmp_path / "cpuinfo" if path == "/proc/cpuinfo" else None)
    assert has_bfloat16(CPU) is has


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_have_no_units_either(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_bfloat16(torch.device("cuda")) is has
