"""``rsplugins lipschitz`` on the embedded model, and the rule that marks cuts."""

import json

import pytest
from typer.testing import CliRunner

import rsplugins
from rsplugins.cli.lipschitz import pareto
from rsplugins.cli.main import build
from rsplugins.errors import RspluginsError
from rsplugins.lipschitz import lipschitz_bound
from rsplugins.lipschitz.analysis import Cut

MODEL = "zoo:digits-cnn.digits-gaussian025-v2"


def run(*arguments):
    result = CliRunner().invoke(build(), ["lipschitz", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_table_of_the_embedded_model():
    text = run(MODEL)
    bound = lipschitz_bound(rsplugins.load(MODEL))
    assert f"{bound:.5g}" in text
    assert "folded into the next" in text
    assert "cost share" in text


def test_json_has_the_same_numbers():
    told = json.loads(run(MODEL, "--json"))
    assert told["layers"][-1]["constant"] == lipschitz_bound(rsplugins.load(MODEL))
    shares = [cut["share"] for cut in told["cuts"]]
    assert shares == sorted(shares)
    assert any(cut["best"] for cut in told["cuts"])


def test_until_leaves_the_rest_alone():
    told = json.loads(run(MODEL, "--json", "--until", "1"))
    bounds = {layer["name"]: layer["constant"] for layer in told["layers"]}
    assert bounds["1"] > 0
    assert bounds["2"] is None
    with pytest.raises(RspluginsError, match="no layer named '99'"):
        run(MODEL, "--until", "99")


@pytest.mark.parametrize("size", ["8", "1,a,8", "0,8,8"])
def test_a_malformed_size_is_refused(size):
    with pytest.raises(RspluginsError, match="C,H,W"):
        run(MODEL, "--input-size", size)


def test_marked_cuts_are_those_that_no_other_beats():
    cuts = [Cut("a", 2.0, 0.1), Cut("b", 1.5, 0.2), Cut("c", 9.0, 0.2), Cut("d", float("inf"), 0.9), Cut("e", None, 0.95)]
    assert [cut.layer for cut in pareto(cuts)] == ["b"]
