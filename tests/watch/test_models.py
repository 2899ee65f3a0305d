"""No model that people have is refused by the watch: those of docs/wrap-rate.md, with random weights."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import rsplugins
from rsplugins.errors import RspluginsError
from rsplugins.watch import check_function

TESTS = Path(__file__).resolve().parents[1]
LARGEST = 30
"""Millions of parameters. All of the page below 100 were run once, by raising this."""

_ROWS = re.findall(r"\| `(.+?)` \| (\d+) \| yes", (TESTS.parent / "docs" / "wrap-rate.md").read_text(encoding="utf-8"))
REFERENCES = [reference for reference, millions in _ROWS if int(millions) < LARGEST]


@pytest.mark.parametrize("reference", ["timm:resnet18", "timm:test_vit", "timm:mobilenetv3_small_050"])
def test_a_usual_model_is_not_refused(reference):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    classifier = rsplugins.load(reference, pretrained=False)
    check_function(classifier, torch.rand(1, *classifier.input_size), views=True)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_no_model_of_the_wrap_rate_is_refused(reference):
    try:
        classifier = rsplugins.load(reference, pretrained=False)
    except RspluginsError as error:
        pytest.skip(error.what)
    check_function(classifier, torch.rand(1, *classifier.input_size), views=True)
