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


def test_the_plain_loop_learns_and_is_certified(capsys):
    assert _load("train_and_certify").main(epochs=4) > 0.2
    assert "probabilistic" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["certify_your_model", "run_on_disk"])
def test_an_example_runs_as_it_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _load(name)
    assert "probabilistic" in capsys.readouterr().out


def test_the_loop_with_timms_scheduler_runs(capsys):
    assert math.isfinite(_load("train_timm_scheduler").main(epochs=2))
