from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from rsplugins.errors import ParameterError
from rsplugins.parameters import Count, Eps, Flag, NonNegative, Number, Settings, plain, read, settings
from rsplugins.training import AdversarialTraining, Gairat, GaussianAugmentation


@settings(frozen=True)
class Inner(Settings):
    kind: Literal["a", "b"] = "a"


@settings(frozen=True)
class Outer(Settings):
    count: Count
    eps: Eps = 0.1
    free: NonNegative | None = None
    flag: Flag = False
    pair: tuple[int, str] = (1, "x")
    many: tuple[Number, ...] = ()
    inner: Inner = Inner()
    anything: dict[str, Any] | None = None


def test_reads_nested_tables_lists_and_fractions():
    outer = read(Outer, {"count": 2, "eps": "8/255", "many": [1, "1/2"], "inner": {"kind": "b"}, "pair": [3, "y"]}, "[outer]")
    assert outer == Outer(count=2, eps=8 / 255, pair=(3, "y"), many=(1.0, 0.5), inner=Inner(kind="b"))
    assert plain(outer)["inner"] == {"kind": "b"}
    assert "free" not in plain(outer)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"coutn": 1}, ["'coutn'", "Did you mean 'count'?"]),
        ({}, ["lacks 'count'"]),
        ({"count": 0}, ["count", "0", "at least 1"]),
        ({"count": 1.5}, ["whole number"]),
        ({"count": True}, ["whole number"]),
        ({"count": 1, "flag": 1}, ["true or false"]),
        ({"count": 1, "eps": 8}, ["eps", "8/255", "at most 1"]),
        ({"count": 1, "eps": 0}, ["above 0"]),
        ({"count": 1, "eps": math.nan}, ["finite"]),
        ({"count": 1, "eps": "8 of 255"}, ["fraction"]),
        ({"count": 1, "eps": "1/0"}, ["fraction"]),
        ({"count": 1, "free": math.inf}, ["inf"]),
        ({"count": 1, "free": -1}, ["at least 0"]),
        ({"count": 1, "pair": [1]}, ["[pair] lacks"]),
        ({"count": 1, "many": 3}, ["a list"]),
        ({"count": 1, "many": [1, "x"]}, ["many[1]"]),
        ({"count": 1, "inner": {"kind": "c"}}, ["'a' or 'b'"]),
        ({"count": 1, "inner": {"kid": "a"}}, ["Did you mean 'kind'?"]),
        ({"count": 1, "inner": 3}, ["a table"]),
    ],
)
def test_wrong_values_say_what_is_allowed(values, texts):
    with pytest.raises(ParameterError) as caught:
        read(Outer, values, "[outer]")
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: AdversarialTraining(eps=8), lambda: Gairat(eps=4.0), lambda: AdversarialTraining(eps="8")]
)
def test_eps_in_grey_levels_is_refused_with_the_way_to_write_it(make):
    with pytest.raises(ParameterError, match=r"did you mean [48]/255"):
        make()


def test_sigma_in_grey_levels_is_refused():
    with pytest.raises(ParameterError, match="raw"):
        GaussianAugmentation(sigma=63.75)
