"""The methods `attack` and `predict`: accuracies of a linear model are its margins, and no batch decides what it should not."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from scipy import stats
from torch import nn

import rsplugins
from rsplugins.attacks import claims
from rsplugins.attacks.masking import paired_p_value, summarise
from rsplugins.certificate import Guarantee
from rsplugins.certification import batched, prepare, run_certifier
from rsplugins.certifier import Execution
from rsplugins.certifiers.attack import AttackParameters, Scaled
from rsplugins.data import Dataset
from rsplugins.errors import ParameterError, PluginUnavailableError, UsageError
from rsplugins.host import CertifierDescriptor, get_host
from rsplugins.runs.execute import execute, share
from tests.training.cases import TwoClassLinear

has_autoattack = any(importlib.util.find_spec(name) for name in ("pyautoattack", "autoattack"))


RANDOM = {"eps": 0.3, "steps": 1, "step_size": 1e-6}
"""An attack that is hardly more than its random start, which depends on the batch: records of another company would differ."""


def images(count=60):
    return 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def linear():
    """A linear model, the margins of its images, and labels that are its own predictions but for every tenth."""
    x = images()
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
    model = TwoClassLinear(weight, -float((x.flatten(1) @ weight).mean()))
    margin = (x.flatten(1) @ weight + model.bias).detach()
    labels = (margin > 0).long()
    labels[::10] = 1 - labels[::10]
    return model, margin, Dataset.from_arrays(x, labels)


def wrapped(model, classes=2):
    return rsplugins.wrap(model, input_size=(1, 4, 4), num_classes=classes)


def attacked(model, data, out, indices=None, **changes):
    parameters = {"eps": 0.02, "autoattack": (), "batch": 16, **changes}
    return rsplugins.certify(wrapped(model), data, "attack", out=out, indices=indices, progress=False, **parameters)


def survived(run):
    return [row.record.evidence for row in run.rows]


def test_accuracies_of_a_linear_model_are_its_margins(tmp_path):
    model, margin, data = linear()
    run = attacked(model, data, tmp_path / "run")
    found, labels = run.summary()["attacks"], torch.as_tensor(data.labels)
    right = (margin > 0).long() == labels
    robust = right & (margin.abs() > 0.02 * model.weight.abs().sum())
    assert found["clean"] == right.double().mean().item() == 0.9
    assert found["pgd"] == found["margin"] == pytest.approx(robust.double().mean().item())
    assert 0.2 < found["pgd"] < 0.8
    assert (found["autoattack"], found["guarantee"], found["flags"]) == (None, "empirical", [])
    assert [row.radius > 0 for row in run.rows] == robust.tolist()
    assert {str(one.guarantee) for one in run.certificates()} == {"empirical"}
    assert run.summary()["certifies"] is False


def test_saturated_logits_hide_the_gradient_and_are_flagged(tmp_path):
    model, _, data = linear()
    honest = attacked(model, data, tmp_path / "a").summary()["attacks"]
    masked = attacked(Scaled(model, 1e4), data, tmp_path / "b", scales=(0.0001, 0.1)).summary()["attacks"]
    assert masked["pgd"] > honest["pgd"] + 0.2
    assert masked["scaled"]["0.0001"] == masked["margin"] == honest["pgd"]
    assert any("rescaled: likely gradient masking" in flag for flag in masked["flags"])


def rows(count, fell, **others):
    """Records in which so many survivors of PGD fall to each other attack, and to it alone."""
    row = dict.fromkeys(("clean", "pgd", "margin", "pgd x10", "autoattack"), True)
    return [row | {name: False for name, number in {**fell, **others}.items() if i < number} for i in range(count)]


@pytest.mark.parametrize("name", ["autoattack", "margin", "pgd x10"])
@pytest.mark.parametrize(
    ("fell", "count", "flagged"), [(4, 50, False), (3, 20, False), (12, 50, True), (61, 1000, True), (40, 1000, False)]
)
def test_gradient_masking_is_said_only_beyond_the_sampling_error(name, fell, count, flagged):
    found = summarise(rows(count, {name: fell}), 20)
    assert [("likely gradient masking" in flag) for flag in found.flags] == [True] * flagged
    assert all(f"{fell} of {count} inputs" in text for text in (*found.flags, *found.notes))
    assert len(found.notes) == (fell / count > 0.05 and not flagged)
    assert all("too few inputs to tell that from chance" in note for note in found.notes)


def test_the_paired_test_is_a_binomial_one_over_inputs_on_which_the_attacks_differ():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = (torch.rand(30, 2, generator=generator) < torch.rand(2, generator=generator)).tolist()
        made = [{"a": a, "b": b} for a, b in pairs]
        only_b, only_a = (pairs.count([first, not first]) for first in (True, False))
        expected = stats.binomtest(only_b, only_a + only_b, alternative="greater").pvalue if only_a + only_b else 1.0
        assert paired_p_value(made, "a", "b") == pytest.approx(expected)


@pytest.mark.parametrize("kept", [32, 21, 1])
def test_an_interrupted_attack_goes_on_by_whole_batches(tmp_path, kept):
    """The random start of PGD depends on the batch: records made in another company would differ."""
    model, _, data = linear()
    whole = attacked(model, data, tmp_path / "whole", **RANDOM)
    cut = tmp_path / "cut"
    attacked(model, data, cut, **RANDOM)
    lines = (cut / "records.jsonl").read_text().splitlines(keepends=True)
    (cut / "records.jsonl").write_text("".join(lines[:kept]) + '{"index": 32, "cl')
    with pytest.warns(rsplugins.errors.RspluginsWarning, match="torn last line of"):
        again = attacked(model, data, cut, **RANDOM)
    assert survived(again) == survived(whole)
    alone = attacked(model, data, tmp_path / "alone", **RANDOM, batch=1)
    assert survived(alone) != survived(whole)  # or the test would say nothing


def test_shards_take_whole_batches_and_agree_with_one_process(tmp_path):
    model, _, data = linear()
    whole = attacked(model, data, tmp_path / "whole", **RANDOM)
    entry = get_host().find("certifier", "attack")
    parameters = {"autoattack": (), "batch": 16, **RANDOM}
    for number in range(3):
        certifier = prepare(entry, wrapped(model), parameters, Execution())
        run = execute(entry, certifier, data, range(60), tmp_path / "shards", shard=(number, 3))
    assert survived(run) == survived(whole)
    assert [share(range(60), (number, 3), 16) for number in (0, 2)] == [[*range(16), *range(48, 60)], [*range(32, 48)]]


def test_a_file_that_cannot_be_read_leaves_the_other_batches_alone(tmp_path):
    model, _, data = linear()
    whole = attacked(model, data, tmp_path / "whole", **RANDOM)

    class Damaged(Dataset):
        def __getitem__(self, index):
            if index == 3:
                raise rsplugins.errors.UnreadableInputError("a damaged file")
            return super().__getitem__(index)

    damaged = Damaged.from_arrays(images(), torch.as_tensor(data.labels))
    run = attacked(model, damaged, tmp_path / "damaged", **RANDOM)
    assert [row.index for row in run.rows if row.failed] == [3]
    assert survived(run)[16:] == survived(whole)[16:]


def test_another_attack_in_the_same_directory_is_refused_with_the_difference(tmp_path):
    model, _, data = linear()
    attacked(model, data, tmp_path / "run")
    with pytest.raises(UsageError, match=r"parameters.eps: 0.02 -> 0.03"):
        attacked(model, data, tmp_path / "run", eps=0.03)


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"eps": 8}, "8/255"), ({"autoattack": ("apgd",)}, "no attack 'apgd'"), ({"steps": 0}, "at least 1")],
)
def test_bad_settings_are_refused(tmp_path, changes, text):
    model, _, data = linear()
    with pytest.raises(ParameterError, match=text):
        attacked(model, data, tmp_path, **changes)


def test_attacks_are_named_in_one_word_or_a_list():
    assert AttackParameters(eps=0.1, autoattack="none").autoattack == ()
    assert AttackParameters(eps=0.1, autoattack="apgd-ce,square").autoattack == ("apgd-ce", "square")
    assert AttackParameters(eps=0.1).autoattack == AttackParameters(eps=0.1, autoattack="standard").autoattack


def test_missing_autoattack_and_too_few_classes_are_said(tmp_path, monkeypatch):
    model, _, data = linear()
    if has_autoattack:
        with pytest.raises(ParameterError, match="at least 4 classes"):
            attacked(model, data, tmp_path / "a", autoattack=("apgd-t",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PluginUnavailableError, match="pyautoattack"):
        attacked(model, data, tmp_path / "b", autoattack=("apgd-ce",))


@pytest.mark.skipif(not has_autoattack, reason="AutoAttack is not installed")
def test_autoattack_does_not_depend_on_the_scale_of_the_logits_and_pgd_does():
    torch.manual_seed(0)
    x = torch.rand(40, 1, 4, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    labels = net(x).argmax(1)

    def accuracies(model):
        found = rsplugins.attack(wrapped(model, 5), x, labels, eps=0.05, autoattack=("apgd-t", "square"), batch_size=40)
        return summarise([one.evidence["survived"] for one in found], 20)

    plain, scaled = accuracies(net), accuracies(Scaled(net, 1e5))
    assert plain.autoattack <= plain.pgd
    assert scaled.autoattack == plain.autoattack < 0.9
    assert scaled.pgd > plain.pgd + 0.1
    assert any("AutoAttack is" in flag and "likely gradient masking" in flag for flag in scaled.flags)


def test_the_attacked_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()
    model[0].bias.requires_grad_(False)

    def state():
        tensors = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in model.parameters()], [layer.training for layer in model.modules()]
        return tensors, flags, [parameter.grad for parameter in model.parameters()]

    classifier, before = wrapped(model, 5), state()
    rsplugins.attack(classifier, images(), torch.arange(60) % 5, eps=0.02, autoattack=())
    after = state()
    assert after[1:] == before[1:]
    for name, (value, stride) in before[0].items():
        assert torch.equal(value, after[0][name][0])
        assert stride == after[0][name][1]


def test_predictions_are_a_run_without_a_guarantee(tmp_path):
    model, margin, data = linear()
    run = rsplugins.certify(wrapped(model), data, "predict", out=tmp_path / "run", progress=False)
    assert [row.prediction for row in run.rows] == (margin > 0).long().tolist()
    summary = run.summary()
    assert (summary["guarantee"], summary["certifies"], summary["accuracy"]) == ("none", False, 0.9)
    assert summary["clean_accuracy"] == 0.9
    assert {one.radius for one in run.certificates()} == {0.0}
    assert "no guarantee" in str(run.certificates()[0])
    head = (tmp_path / "run" / "results.tsv").read_text().splitlines()[0]
    assert "none_radius" in head


def test_only_a_method_without_a_claim_is_told_the_labels():
    said = {"name": "lab", "summary": "x", "factory": "a:b", "claim": "a:b", "norms": (rsplugins.Norm.L2,), "labelled": True}
    for guarantee in (Guarantee.DETERMINISTIC, Guarantee.PROBABILISTIC, Guarantee.ESTIMATE):
        with pytest.raises(ValueError, match="labelled"):
            CertifierDescriptor(**said, guarantee=guarantee)
    assert CertifierDescriptor(**said, guarantee=Guarantee.EMPIRICAL).labelled


def test_an_attack_without_labels_is_refused():
    model, _, _ = linear()
    with pytest.raises(UsageError, match="needs the true classes"):
        rsplugins.certify(wrapped(model), images(3), "attack", eps=0.1, autoattack=())
    entry = get_host().find("certifier", "attack")
    certifier = prepare(entry, wrapped(model), {"eps": 0.1, "autoattack": ()}, Execution())
    with pytest.raises(UsageError, match="needs the true class"):
        list(run_certifier(entry, certifier, [batched(certifier, 0, images(1)[0], 0)]))


@pytest.mark.parametrize(
    "evidence",
    [
        {"prediction": 1, "survived": {}},
        {"prediction": 1, "survived": {"pgd": 1}},
        {"prediction": -1, "survived": {"pgd": True}},
        {"prediction": "1", "survived": {"pgd": True}},
    ],
)
def test_evidence_of_another_form_is_refused(evidence):
    with pytest.raises((ValueError, TypeError)):
        claims.attack(evidence, {"eps": 0.1})


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"compile": True}])
@pytest.mark.parametrize("method", ["attack", "predict"])
def test_they_run_the_model_as_it_is(method, change):
    model, _, data = linear()
    parameters = {"eps": 0.1, "autoattack": ()} if method == "attack" else {}
    with pytest.raises(ParameterError, match="as it is"):
        rsplugins.certify(wrapped(model), data, method, **parameters, **change)


def test_records_are_plain_json(tmp_path):
    model, _, data = linear()
    attacked(model, data, tmp_path / "run", indices=data.select(stride=20))
    first = json.loads((tmp_path / "run" / "records.jsonl").read_text().splitlines()[0])
    assert first["evidence"]["survived"].keys() == {"clean", "pgd", "margin", "pgd x0.1", "pgd x10", "pgd x100"}
