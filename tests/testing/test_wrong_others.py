"""The contract catches bound operators, moment rules and data sets that are wrong, and passes those that are not."""

from __future__ import annotations

import importlib.util

import pytest

from rsplugins import BoundOperatorDescriptor, DatasetDescriptor, Guarantee, MomentRuleDescriptor
from rsplugins.errors import ParameterError
from rsplugins.host import Entry, get_host
from rsplugins.testing import bound_operator_checks, dataset_checks, moment_rule_checks
from rsplugins.testing.finding import checks_for

lirpa = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")


def operator(name: str, guarantee: Guarantee = Guarantee.DETERMINISTIC) -> Entry:
    descriptor = BoundOperatorDescriptor(
        name=name.lower(),
        summary="wrong",
        factory=f"tests.testing.wrong_operators:{name}",
        operator="onnx::Elu",
        guarantee=guarantee,
    )
    return Entry(name.lower(), "bound-operator", "wrong", "wrong", "1.0", descriptor=descriptor)


def rule(name: str) -> Entry:
    text = name.replace("_", "-")
    descriptor = MomentRuleDescriptor(
        name=text, summary="wrong", factory=f"tests.testing.wrong_operators:{name}", operator="BoundElu"
    )
    return Entry(text, "moment-rule", "wrong", "wrong", "1.0", descriptor=descriptor)


def failed(checks) -> dict[str, str]:
    return {outcome.name: outcome.detail for check in checks if (outcome := check.outcome()).status == "failed"}


@lirpa
@pytest.mark.parametrize(
    ("name", "caught_by", "words"),
    [
        ("Narrow", "intervals", "outside of their bounds"),
        ("OneSided", "intervals", "outside of their bounds"),
        ("Floor", "degenerate boxes", "boxes of one point"),
        ("Swapped", "intervals", "above the upper"),
        ("ChordBelow", "linear relaxation", "outside of their bounds"),
        ("TangentAbove", "linear relaxation", "outside of their bounds"),
        ("OtherFunction", "operator", "computes another function than the layer"),
        ("Company", "rows are independent", "batch"),
        ("NotFinite", "intervals", "not finite"),
    ],
)
def test_a_wrong_bound_operator_is_caught(name, caught_by, words):
    found = failed(bound_operator_checks(operator(name)))
    assert caught_by in found, found
    assert words in found[caught_by]


@lirpa
def test_wrong_lines_show_nowhere_but_in_the_relaxation():
    """The interval checks alone would pass them: what catches them is the sum of output and input."""
    assert "intervals" not in failed(bound_operator_checks(operator("ChordBelow")))


@lirpa
@pytest.mark.parametrize("name", ["BoundElu", "IntervalsOnly"])
def test_the_same_operator_without_a_mistake_passes(name):
    outcomes = [check.outcome() for check in bound_operator_checks(operator(name))]
    assert {outcome.name: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}
    assert sum(outcome.status == "passed" for outcome in outcomes) == (6 if name == "BoundElu" else 5)


@lirpa
def test_an_estimate_is_measured():
    (outcome,) = [c.outcome() for c in bound_operator_checks(operator("Narrow", Guarantee.ESTIMATE)) if c.name == "intervals"]
    assert outcome.status == "measured"
    assert not outcome.detail.startswith("0 of")


@lirpa
@pytest.mark.parametrize(
    "entry", [e for e in get_host().entries("bound-operator") if e.distribution == "rsplugins"], ids=lambda entry: entry.name
)
def test_built_in_bound_operators(entry):
    assert failed(bound_operator_checks(entry)) == {}


@lirpa
@pytest.mark.parametrize(
    "name", ["mean_of_the_mean", "deviation", "sigma", "independent", "other_function", "identity", "rectified"]
)
def test_a_wrong_moment_rule_is_caught(name):
    found = failed(moment_rule_checks(rule(name)))
    assert any("samples say" in detail for detail in found.values()), found


@lirpa
def test_the_same_rule_without_a_mistake_passes():
    outcomes = [check.outcome() for check in moment_rule_checks(rule("right"))]
    assert {outcome.status for outcome in outcomes} == {"passed"}, outcomes


@lirpa
@pytest.mark.parametrize("kind", [bound_operator_checks, moment_rule_checks])
def test_a_layer_without_the_operator_checks_nothing_and_fails(kind):
    entry = operator("BoundElu") if kind is bound_operator_checks else rule("right")
    assert "another layer has to be named" in failed(kind(entry, reference="torch.nn:ReLU"))["operator"]
    assert failed(kind(entry, reference="torch.nn:ELU")) == {}
    assert "cannot be made" in failed(kind(entry, reference="torch.nn:Elu"))["operator"]


class _Host:
    """Finds one data set under the name that it says it has."""

    def __init__(self, factory: str) -> None:
        descriptor = DatasetDescriptor(name="wrong", summary="wrong", factory=f"tests.testing.wrong_datasets:{factory}")
        self.entry = Entry("wrong", "dataset", "wrong", "wrong", "1.0", descriptor=descriptor)

    def find(self, kind, name):
        assert (kind, name) == ("dataset", "wrong")
        return self.entry


@pytest.mark.parametrize(
    ("name", "caught_by"),
    [
        ("bytes_", "images"),
        ("normalised", "images"),
        ("twice", "images"),
        ("double", "images"),
        ("integers", "images"),
        ("nan", "images"),
        ("shape", "images"),
        ("size", "images"),
        ("too_many", "labels"),
        ("negative", "labels"),
        ("names", "labels"),
        ("other_labels", "labels"),
        ("empty", "data set"),
        ("renamed", "data set"),
        ("longer", "length"),
        ("wraps", "length"),
        ("random", "the same when read again"),
        ("counted", "the same when read again"),
        ("shared", "the same when read again"),
        ("by_load", "the same when loaded again"),
        ("order", "the same when loaded again"),
        ("digest", "the same when loaded again"),
        ("any_split", "split errors"),
        ("any_option", "option errors"),
    ],
)
def test_a_wrong_data_set_is_caught(monkeypatch, name, caught_by):
    monkeypatch.setattr("rsplugins.host.get_host", lambda: _Host(name))
    assert caught_by in failed(dataset_checks("wrong"))


def test_the_same_data_set_without_a_mistake_passes(monkeypatch):
    monkeypatch.setattr("rsplugins.host.get_host", lambda: _Host("right"))
    assert {check.outcome().status for check in dataset_checks("wrong")} == {"passed"}


@pytest.mark.parametrize("name", ["digits", "moving-digits"])
def test_built_in_data_sets(name):
    assert failed(dataset_checks(name)) == {}


def test_the_kind_follows_from_the_name():
    assert {check.name for check in checks_for(None, "digits", {})} == {check.name for check in dataset_checks("digits")}
    assert checks_for(None, "etb-gemm", {})[0].name == "operator"
    assert checks_for(None, "gaussian", {})[0].name == "descriptor"  # a certifier and a training hook have the name
    with pytest.raises(ParameterError):
        checks_for(None, "gaussian", {}, about="nothing")
