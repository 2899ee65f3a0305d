"""What bounds are computed in is called precision; no certifier has a parameter that rsplugins.certify keeps for itself."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types

import pytest
import torch
from pydantic import Field, create_model
from torch import nn

import rsplugins
from rsplugins import Certifier, CertifierDescriptor, CertifierParameters, Guarantee, Norm
from rsplugins.certification import certifier_class, taken_names
from rsplugins.errors import ParameterError, PluginError
from rsplugins.host import Entry, Status, get_host
from rsplugins.lirpa import claims
from rsplugins.runs.campaign import Request, assign_settings
from rsplugins.runs.manifest import Manifest, Selection, difference
from rsplugins.testing import certifier_checks

lirpa = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "etb", "sound-etb")
KEYWORDS = [name for name in inspect.signature(rsplugins.certify).parameters if name != "parameters"]


@pytest.fixture(scope="module")
def classifier():
    layer = nn.Linear(4, 3)
    layer.weight.data = torch.arange(12.0).view(3, 4).sin()
    return rsplugins.wrap(nn.Sequential(nn.Flatten(), layer), input_size=(1, 2, 2))


@lirpa
@pytest.mark.parametrize("method", METHODS)
def test_precision_is_what_the_bounds_are_computed_in(classifier, method):
    x = torch.full((1, 1, 2, 2), 0.5)
    for precision in ("float64", "float32"):
        (found,) = rsplugins.certify(classifier, x, method, precision=precision, eps=0.01)
        said = "float32" if method == "alpha-crown" else precision
        rounded = "" if method == "etb" else ", rounded outward,"  # an estimate is not a bound whatever its rounding
        slack = {"float64": "1e-10", "float32": "1e-05"}[said]
        assert found.assumptions[0].endswith(f"; bounds in {said}{rounded} with a relative slack of {slack}")
        assert found.parameters["precision"] == precision
        assert found.function["arithmetic"] == f"{precision}, full precision"
    margins = (found.evidence["certified"] or found.evidence["refuted"])["margins"]
    assert margins == [float(torch.tensor(value, dtype=torch.float32)) for value in margins]


@pytest.mark.parametrize("method", ["crown", "gaussian"])
def test_a_run_in_float64_is_refused_in_words_that_name_precision(classifier, method):
    with pytest.raises(ParameterError, match="dtype is 'float64'") as raised:
        rsplugins.certify(classifier, torch.zeros(1, 1, 2, 2), method, dtype="float64")
    assert 'precision="float64"' in raised.value.fix


def test_the_old_name_is_refused_with_the_new_one():
    entries = [get_host().find("certifier", "crown")]
    with pytest.raises(ParameterError, match="no parameter 'dtype'") as raised:
        assign_settings(entries, Request(settings={"dtype": "float32"}))
    assert "precision" in raised.value.fix


@pytest.mark.parametrize("method", METHODS)
def test_records_of_earlier_releases_are_claimed_as_before(method):
    evidence = {"logits": [3.0, 1.0], "certified": {"eps": 0.25, "margins": [3e-5]}, "refuted": None}
    claim = getattr(claims, method.replace("-", "_"))
    for precision in ("float64", "float32"):
        old, new = (claim(evidence, {"norm": "linf", name: precision}) for name in ("dtype", "precision"))
        assert old == new
        assert new.radius == (0.25 if precision == "float64" and method != "alpha-crown" else 0.0)


def test_a_run_of_an_earlier_release_is_resumed():
    def manifest(**parameters):
        return Manifest(method="crown", parameters=parameters, selection=Selection(start=0, stop=3))

    assert difference(manifest(norm="linf", dtype="float64"), manifest(norm="linf", precision="float64")) == []
    assert difference(manifest(dtype="float64"), manifest(precision="float32")) == [
        "parameters.precision: 'float64' -> 'float32'"
    ]


def entry(monkeypatch, parameters: type) -> Entry:
    class Method(Certifier):
        Parameters = parameters

        def gather(self, inputs):
            raise NotImplementedError

    module = types.ModuleType("stranger")
    module.Method, module.claim = Method, print
    monkeypatch.setitem(sys.modules, "stranger", module)
    descriptor = CertifierDescriptor(
        name="mine",
        summary="a stranger's",
        factory="stranger:Method",
        claim="stranger:claim",
        guarantee=Guarantee.DETERMINISTIC,
        norms=(Norm.L2,),
    )
    return Entry("mine", "certifier", "mine", "stranger", "1.2", descriptor=descriptor)


@pytest.mark.parametrize("alias", [False, True], ids=["name", "alias"])
@pytest.mark.parametrize("name", KEYWORDS)
def test_a_parameter_that_certify_keeps_for_itself_is_refused(monkeypatch, name, alias):
    fields = {"own": (int, Field(1, alias=name))} if alias else {name: (int, 1)}
    found = entry(monkeypatch, create_model("Parameters", __base__=CertifierParameters, **fields))
    with pytest.raises(PluginError, match=rf"'mine' \(stranger 1.2\) has a parameter named '{name}'.*rsplugins.certify"):
        certifier_class(found)
    outcome = next(check for check in certifier_checks(found) if check.name == "descriptor").outcome()
    assert outcome.status == "failed"
    assert f"a parameter named {name!r}" in outcome.detail


def test_other_names_are_not(monkeypatch):
    assert certifier_class(entry(monkeypatch, create_model("P", __base__=CertifierParameters, split=(str, ""), stride=(int, 1))))


@pytest.mark.parametrize("found", [e for e in get_host().entries("certifier") if e.status is Status.ACTIVE], ids=lambda e: e.name)
def test_no_certifier_here_has_one(found):
    assert taken_names(certifier_class(found)) == []
