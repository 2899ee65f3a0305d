from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from scipy import stats
from torch import nn
from training_cases import TwoClassLinear, small_net

from rsplugins.errors import ParameterError, PluginUnavailableError, UsageError
from rsplugins.training import ImageTable
from rsplugins.training.robustness import RECORDS, AttackSettings, Scaled, attack, paired_p_value, summarise

has_autoattack = any(importlib.util.find_spec(name) for name in ("pyautoattack", "autoattack"))


def _images(count=60, classes=2):
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=generator)
    return ImageTable(images, torch.arange(count) % classes, classes)


def _linear(table):
    """A linear model whose labels are its own predictions but for every tenth."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
    bias = -float((table.images.flatten(1) @ weight).mean())
    model = TwoClassLinear(weight, bias)
    margin = (table.images.flatten(1) @ weight + bias).detach()
    labels = (margin > 0).long()
    labels[::10] = 1 - labels[::10]
    return model, margin, ImageTable(table.images, labels, 2)


def _settings(**changes):
    return AttackSettings(**{"eps": 0.02, "autoattack": (), "images": 60, "batch_size": 16, **changes})


def test_accuracies_of_a_linear_model_are_its_margins(tmp_path):
    model, margin, table = _linear(_images())
    result = attack(model, table, _settings(), tmp_path)
    right = (margin > 0).long() == table.labels
    robust = right & (margin.abs() > 0.02 * model.weight.abs().sum())
    assert result.clean == right.double().mean().item() == 0.9
    assert result.pgd == result.margin == pytest.approx(robust.double().mean().item())
    assert 0.2 < result.pgd < 0.8
    assert result.autoattack is None
    assert result.guarantee == "empirical"
    assert not result.flags


def test_attacked_inputs_are_spread_over_a_table_that_is_sorted_by_class(tmp_path):
    images = _images()
    attack(small_net(), images, _settings(images=len(images) // 3), tmp_path / "spread")
    attack(small_net(), images, _settings(images=5, stride=2), tmp_path / "stride")
    found = {name: [json.loads(line)["index"] for line in (tmp_path / name / RECORDS).open()] for name in ("spread", "stride")}
    assert found == {"spread": list(range(0, len(images) // 3 * 3, 3)), "stride": [0, 2, 4, 6, 8]}


def test_saturated_logits_hide_the_gradient_and_are_flagged(tmp_path):
    model, _, table = _linear(_images())
    honest = attack(model, table, _settings(), tmp_path / "a")
    masked = attack(Scaled(model, 1e4), table, _settings(scales=(0.0001, 0.1)), tmp_path / "b")
    assert masked.pgd > honest.pgd + 0.2
    assert masked.scaled["0.0001"] == masked.margin == honest.pgd
    assert any("rescaled: likely gradient masking" in flag for flag in masked.flags)


def _rows(count, fell, **others):
    """Records in which so many survivors of PGD fall to each other attack, and to it alone."""
    row = dict.fromkeys(("clean", "pgd", "margin", "pgd x10", "autoattack"), True)
    return [row | {name: False for name, number in {**fell, **others}.items() if i < number} for i in range(count)]


@pytest.mark.parametrize("name", ["autoattack", "margin", "pgd x10"])
@pytest.mark.parametrize(
    ("fell", "count", "flagged"), [(4, 50, False), (3, 20, False), (12, 50, True), (61, 1000, True), (40, 1000, False)]
)
def test_gradient_masking_is_said_only_beyond_the_sampling_error(name, fell, count, flagged):
    settings = _settings(scales=(10.0,), autoattack=("apgd-ce",))
    found = summarise(_rows(count, {name: fell}), settings)
    assert [("likely gradient masking" in flag) for flag in found.flags] == [True] * flagged
    assert all(f"{fell} of {count} inputs" in text for text in (*found.flags, *found.notes))
    assert len(found.notes) == (fell / count > 0.05 and not flagged)
    assert all("too few inputs to tell that from chance" in note for note in found.notes)


def test_the_paired_test_is_a_binomial_one_over_inputs_on_which_the_attacks_differ():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = (torch.rand(30, 2, generator=generator) < torch.rand(2, generator=generator)).tolist()
        rows = [{"a": a, "b": b} for a, b in pairs]
        only_b, only_a = (pairs.count([first, not first]) for first in (True, False))
        expected = stats.binomtest(only_b, only_a + only_b, alternative="greater").pvalue if only_a + only_b else 1.0
        assert paired_p_value(rows, "a", "b") == pytest.approx(expected)


@pytest.mark.parametrize(("kept", "resumes_at"), [(32, 32), (21, 16)])
def test_an_interrupted_attack_goes_on_and_torn_lines_and_batches_are_dropped(tmp_path, kept, resumes_at):
    model, _, table = _linear(_images())
    whole = attack(model, table, _settings(), tmp_path / "whole")

    class StopError(Exception):
        pass

    def interrupt(done, total):
        if done >= 32:
            raise StopError

    with pytest.raises(StopError):
        attack(model, table, _settings(), tmp_path / "cut", progress=interrupt)
    records = tmp_path / "cut" / RECORDS
    assert len(records.read_text().splitlines()) == 32
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:kept]) + '{"index": 32, "cl')
    calls = []
    resumed = attack(model, table, _settings(), tmp_path / "cut", progress=lambda done, total: calls.append(done))
    assert calls[0] == resumes_at
    assert resumed == whole
    assert records.read_text() == (tmp_path / "whole" / RECORDS).read_text()
    assert json.loads((tmp_path / "cut/attack.json").read_text())["result"]["images"] == 60


def test_another_attack_in_the_same_directory_is_refused_with_the_difference(tmp_path):
    model, _, table = _linear(_images())
    attack(model, table, _settings(), tmp_path, identity={"model": "a"})
    with pytest.raises(UsageError, match=r"eps 0.02 -> 0.03; model a -> b"):
        attack(model, table, _settings(eps=0.03), tmp_path, identity={"model": "b"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"eps": 8}, "8/255"), ({"autoattack": ("apgd",)}, "no attack 'apgd'"), ({"steps": 0}, "at least 1")],
)
def test_bad_settings_are_refused(changes, text):
    with pytest.raises(ParameterError, match=text):
        _settings(**changes)


def test_missing_autoattack_and_too_few_classes_are_said(tmp_path, monkeypatch):
    table = _images(classes=3)
    if has_autoattack:
        with pytest.raises(ParameterError, match="at least 4 classes"):
            attack(small_net(), table, _settings(autoattack=("apgd-t",)), tmp_path / "a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PluginUnavailableError, match="pyautoattack"):
        attack(small_net(), table, _settings(autoattack=("apgd-ce",)), tmp_path / "b")


@pytest.mark.skipif(not has_autoattack, reason="AutoAttack is not installed")
def test_autoattack_does_not_depend_on_the_scale_of_the_logits_and_pgd_does(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(40, 1, 4, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    table = ImageTable(images, net(images).argmax(1), 5)
    settings = _settings(eps=0.05, autoattack=("apgd-t", "square"), images=40, batch_size=40)
    plain = attack(net, table, settings, tmp_path / "a")
    scaled = attack(Scaled(net, 1e5), table, settings, tmp_path / "b")
    assert plain.autoattack <= plain.pgd
    assert scaled.autoattack == plain.autoattack < 0.9
    assert scaled.pgd > plain.pgd + 0.1
    assert any("AutoAttack is" in flag and "likely gradient masking" in flag for flag in scaled.flags)


def test_the_attacked_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).train()
    model[0].bias.requires_grad_(False)

    def state():
        tensors = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in model.parameters()], [layer.training for layer in model.modules()]
        return tensors, flags, [parameter.grad for parameter in model.parameters()]

    before = state()
    attack(model, _images(classes=5), _settings(autoattack=()), tmp_path)
    after = state()
    assert after[1:] == before[1:]
    for name, (value, stride) in before[0].items():
        assert torch.equal(value, after[0][name][0])
        assert stride == after[0][name][1]
