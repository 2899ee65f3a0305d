from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _load(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_plain_loop_learns(capsys):
    assert _load("train_plain_loop").main(epochs=4) > 0.5


@pytest.mark.slow
def test_the_plain_loop_as_shipped_learns_well():
    assert _load("train_plain_loop").main() > 0.85


def test_the_loop_with_timms_scheduler_runs(capsys):
    assert math.isfinite(_load("train_timm_scheduler").main(epochs=2))
