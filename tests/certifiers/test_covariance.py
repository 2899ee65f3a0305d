"""The certifier ``covariance`` from outside: certify, records, refusals, plugins' rules."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import rsplugins
from rsplugins.data import load as load_data
from rsplugins.errors import ParameterError, PluginError, UsageError
from rsplugins.moments import claims, plugins
from rsplugins.moments.activations import Activation
from rsplugins.moments.operations import Elementwise

DIGITS = "zoo:digits-cnn.digits-gaussian025-v2"


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits", split="test")
    return rsplugins.load(DIGITS), torch.stack([data[index][0] for index in range(0, 300, 25)])


def linear(classes=2, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    return rsplugins.wrap(network, input_size=(1, 4, 4), num_classes=classes, **options)


@pytest.mark.parametrize("representation", ["full", "low-rank", "channel"])
@pytest.mark.parametrize("sigma", [0.05, 0.25, 1.0])
def test_a_linear_classifier_gets_its_distance_to_the_boundary(sigma, representation):
    classifier, x = linear(mean=0.3, std=0.25), torch.rand(5, 1, 4, 4)
    w = classifier.module[1].weight / 0.25
    logits = classifier(x)
    distance = ((logits[:, 0] - logits[:, 1]).abs() / (w[0] - w[1]).norm()).tolist()
    found = rsplugins.certify(classifier, x, "covariance", sigma=sigma, representation=representation)
    assert [c.radius for c in found] == pytest.approx(distance, abs=1e-5)
    assert [c.prediction for c in found] == logits.argmax(1).tolist()


def test_estimates_follow_monte_carlo_on_a_trained_network(digits):
    classifier, x = digits
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        noisy = [classifier(image + 0.25 * torch.randn(6000, 1, 8, 8, generator=generator)).argmax(1) for image in x]
    share = np.array([(votes == votes.mode().values).double().mean().item() for votes in noisy])
    use = (share > 0.5) & (share < 0.99)  # further out the tails are heavier than a Gaussian's
    truth = 0.25 * stats.norm.ppf(share)
    found = np.array([c.radius for c in rsplugins.certify(classifier, x, "covariance", rule="sampled")])
    assert use.sum() >= 4
    assert np.abs(found - truth)[use].mean() < 0.05
    published = rsplugins.certify(classifier, x, "covariance", rule="as-published", representation="published")
    assert np.abs(np.array([c.radius for c in published]) - truth)[use].mean() > 0.1


def test_certificates_are_estimates_and_survive_json(digits):
    classifier, x = digits
    found = rsplugins.certify(classifier, x[:2], "covariance")[0]
    assert (str(found.guarantee), str(found.norm), found.alpha, found.samples) == ("estimate", "l2", None, 0)
    assert "estimate" in str(found)
    again = claims.covariance(json.loads(json.dumps(found.evidence)), found.parameters)
    assert (again.radius, again.prediction) == (found.radius, found.prediction)


def test_the_memory_that_is_needed_is_said_before(digits, capsys):
    rsplugins.certify(digits[0], digits[1][:1], "covariance")
    said = capsys.readouterr()
    assert "one input needs about" in said.err
    assert "with full" in said.err
    assert not said.out


def test_nothing_is_said_where_nothing_is_left_to_do(digits, capsys):
    rsplugins.certify(digits[0], digits[1][:0], "covariance")
    assert capsys.readouterr().err == ""


def test_batches_do_not_change_estimates(digits):
    classifier, x = digits
    together = rsplugins.certify(classifier, x[:3], "covariance")
    alone = rsplugins.certify(classifier, x[2:3], "covariance")[0]
    assert alone.radius == pytest.approx(together[2].radius, rel=1e-9)


@pytest.mark.parametrize("sigma", [0, -0.25])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ParameterError, match="sigma"):
        rsplugins.certify(linear(), torch.rand(1, 1, 4, 4), "covariance", sigma=sigma)


def test_full_that_does_not_fit_names_the_need_and_a_way_out(digits):
    with pytest.raises(ParameterError, match=r"'full' needs about .* MiB .* the limit is 5.12 MiB") as error:
        rsplugins.certify(digits[0], digits[1][:1], "covariance", representation="full", memory_gib=0.005)
    assert "low-rank" in error.value.fix


def test_training_mode_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    classifier = rsplugins.wrap(network, input_size=(1, 4, 4), num_classes=2)
    network.train()
    with pytest.raises(UsageError, match="training mode"):
        rsplugins.certify(classifier, torch.rand(1, 1, 4, 4), "covariance")


def softplus():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 2))
    return rsplugins.wrap(network, input_size=(1, 4, 4), num_classes=2)


def test_a_layer_without_a_rule_is_named():
    with pytest.raises(ParameterError, match=r"'module\.2' \(Softplus\)") as error:
        rsplugins.certify(softplus(), torch.rand(1, 1, 4, 4), "covariance", representation="full")
    assert "rsplugins_moment_rules" in error.value.fix


def test_a_layer_that_only_torch_export_knows_is_propagated_through():
    (found,) = rsplugins.certify(softplus(), torch.rand(1, 1, 4, 4), "covariance", progress=False)
    assert found.evidence.get("linearised", []) == []
    assert str(found.guarantee) == "estimate"


class _Entry:
    """A host's entry, as far as rules are concerned."""

    status = plugins.Status.ACTIVE
    label = "moment-rule 'softplus' of stranger 1.0"
    descriptor = rsplugins.MomentRuleDescriptor(name="softplus", summary="s", operator="BoundSoftplus", factory="a:b")

    def load(self):
        return lambda site: Elementwise(Activation(nn.functional.softplus))


class _Host:
    def __init__(self, entries):
        self._entries = entries

    def entries(self, kind):
        assert kind == "moment-rule"
        return self._entries


def test_a_plugins_rule_is_used(monkeypatch):
    monkeypatch.setattr(plugins, "get_host", lambda: _Host([_Entry()]))
    classifier, x = softplus(), torch.rand(1, 1, 4, 4)
    found = rsplugins.certify(classifier, x, "covariance", sigma=0.3)[0]
    with torch.no_grad():
        logits = classifier(x + 0.3 * torch.randn(40_000, 1, 4, 4))
    spread = (logits[:, 0] - logits[:, 1]).std().item()
    table = found.evidence["covariance"]
    assert (table[0][0] + table[1][1] - 2 * table[0][1]) ** 0.5 == pytest.approx(spread, rel=0.03)


def test_two_rules_for_one_operator_are_an_error(monkeypatch):
    monkeypatch.setattr(plugins, "get_host", lambda: _Host([_Entry(), _Entry()]))
    with pytest.raises(PluginError, match="Two moment rules for BoundSoftplus"):
        plugins.plugin_rules()
