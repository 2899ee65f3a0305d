"""The page of method rates: what it says follows from its tables, and a sample of it is run anew when asked for."""

from __future__ import annotations

import re

import pytest

from tests.models import method_rate

PAGE = method_rate.PAGE.read_text(encoding="utf-8")
REACHED = {"gaussian": 0.92, "covariance": 0.84, "covariance-guided": 0.8, "ibp": 0.85, "latent": 0.8, "lipschitz-margin": 0.8}
"""Shares that may not be lost again; what is wanted stands in :data:`method_rate.SHARES`."""


def totals():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) of (\d+) \|", PAGE, re.M)
    return {name: (int(good), int(count)) for name, good, count in rows}


@pytest.mark.parametrize("method", REACHED)
def test_shares_that_were_reached_are_kept(method):
    good, count = totals()[method]
    assert count >= 20
    assert good / count >= REACHED[method]


def test_every_method_has_a_row_and_every_network_is_one_of_the_wrap_rate():
    assert set(totals()) == set(method_rate.METHODS)
    named = set(re.findall(r"`(?:timm:|robustbench:)?([^`]+)`", method_rate.wrap_rate.PAGE.read_text(encoding="utf-8")))
    listed = set(re.findall(r"^\| `([^`]+)` \| [\dx]* \|", PAGE, re.M))
    assert listed
    assert listed <= named


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gaussian", "covariance", "ibp", "crown-ibp", "sound-etb"])
@pytest.mark.parametrize(
    "reference", ["timm:test_vit4", "timm:edgenext_xx_small", "timm:poolformer_s12", "timm:tf_mobilenetv3_large_minimal_100"]
)
def test_a_method_works_on_a_network_as_it_comes(reference, method):
    found = method_rate.separately(reference, method)
    assert found["works"], found["note"]
