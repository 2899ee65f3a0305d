"""``rsplugins plugins show``: what can be set, held against the code that checks it."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from rsplugins.cli import plugins
from rsplugins.errors import ParameterError, PluginError, UnknownNameError
from rsplugins.host import get_host
from rsplugins.host.entries import guard
from rsplugins.host.parameters import parameters
from rsplugins.parameters import parse_parameters
from rsplugins.training.registry import make_hook

OURS = [entry for entry in get_host().entries() if entry.distribution == "rsplugins" and entry.status == "active"]
CERTIFIERS = [entry for entry in OURS if entry.kind == "certifier"]
HOOKS = [entry for entry in OURS if entry.kind == "training-hook"]

PLUGIN = """
import rsplugins
RSPLUGINS_API = 1

class Hook:
    '''A hook.

    Args:
        sigma: standard deviation,
            on raw pixels.
        *rest: more.
    '''

    def __init__(self, sigma, samples: int = 2, *rest): ...

@rsplugins.hookimpl
def rsplugins_training_hooks():
    return [rsplugins.TrainingHookDescriptor(name="mine", summary="s", factory="lab:Hook")]
"""


def show(*arguments: str) -> str:
    app = typer.Typer()
    plugins.register(app)
    result = CliRunner().invoke(app, ["plugins", "show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def known(kind: str, name: str) -> dict:
    return {each.name: each for each in parameters(get_host().find(kind, name))}


@pytest.mark.parametrize("entry", [*CERTIFIERS, *HOOKS], ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_everything_that_can_be_set_has_a_type_and_a_meaning(entry):
    for each in parameters(entry):
        assert each.type, each
        assert each.meaning, each
        assert not {"`", "\n"} & set(each.meaning.replace("`rsplugins", "").replace("MODEL`", "")), each


@pytest.mark.parametrize("entry", CERTIFIERS, ids=lambda entry: entry.name)
def test_a_certifiers_defaults_are_those_it_runs_with(entry):
    needed = {each.name: 0.1 for each in parameters(entry) if each.required}
    values = {each.name: each.default for each in parameters(entry) if not each.required}
    made = parse_parameters(entry.load().Parameters, {**needed, **values}, entry.name)
    assert made == parse_parameters(entry.load().Parameters, needed, entry.name)
    assert {*needed, *values} == set(made.model_dump())


def test_ranges_are_the_ones_that_are_checked():
    found = known("certifier", "gaussian")
    assert (found["alpha"].range, found["n"].range, found["stop_at"].type) == (
        "above 0 and below 1",
        "at least 1",
        "list of float",
    )
    assert (known("certifier", "ibp")["norm"].type, known("certifier", "ibp")["eps"].range) == ("l1 | l2 | linf", "above 0")
    hook = known("training-hook", "gaussian")["sigma"]
    assert (hook.range, hook.required) == ("above 0 and at most 4", True)
    with pytest.raises(ParameterError):
        make_hook({"name": "gaussian", "sigma": 4.1})
    assert known("training-hook", "fat")["tau"].type == "list of [int, int]"
    assert known("model-source", "timm")["pretrained"].meaning.startswith("weights from the hub")


def test_a_strangers_hook_is_read_from_its_signature_and_docstring(install):
    install("lab", PLUGIN)
    (sigma, samples, rest) = parameters(get_host().find("training-hook", "mine"))
    assert (sigma.required, sigma.meaning) == (True, "standard deviation, on raw pixels")
    assert (samples.type, samples.default, samples.required, rest.required) == ("int", 2, False, False)


def test_the_command_shows_every_kind_of_that_name():
    text = show("gaussian")
    assert "certifier 'gaussian'" in text
    assert "training-hook 'gaussian'" in text
    assert "standard deviation of the noise, on raw [0, 1] pixels" in text
    assert "training-hook" not in show("gaussian", "--kind", "certifier")
    (row,) = json.loads(show("ibp", "--kind", "certifier", "--json"))
    assert row["guarantee"] == "deterministic"
    assert [each["default"] for each in row["parameters"] if each["name"] == "norm"] == ["linf"]
    assert "it has no parameters" in show("digits")
    with pytest.raises(UnknownNameError, match="Did you mean 'gaussian'"):
        show("gausian")


def test_what_cannot_be_used_is_shown_with_the_reason(install, good):
    install("lab", good("lab", requires=("no-such-dist>=3",)))
    assert "pip install 'no-such-dist>=3'" in show("lab")


def test_a_wrong_parameter_points_to_the_command():
    entry = get_host().find("certifier", "gaussian")
    with pytest.raises(ParameterError, match="rsplugins plugins show gaussian"):
        parse_parameters(entry.load().Parameters, {"sgima": 1}, "gaussian")


def test_norms_may_be_spelled_as_the_field_does():
    model = get_host().find("certifier", "ibp").load().Parameters
    spelled = ["linf", "Linf", "L_inf", "inf", "l2", "L2", "2", 2, "L1", 1]
    assert [parse_parameters(model, {"norm": one}, "ibp").model_dump(mode="json")["norm"] for one in spelled] == [
        *["linf"] * 4, *["l2"] * 4, *["l1"] * 2,
    ]  # fmt: skip
    with pytest.raises(ParameterError, match="norm is 'l3'; allowed: 'l1', 'l2' or 'linf'"):
        parse_parameters(model, {"norm": "l3"}, "ibp")


def test_an_error_in_a_built_in_plugin_does_not_send_to_another_release_of_this_one():
    with pytest.raises(PluginError) as caught, guard(get_host().find("certifier", "ibp"), "while certifying"):
        raise RuntimeError
    assert "pip install" not in str(caught.value)
    assert "rsplugins doctor" in str(caught.value)
