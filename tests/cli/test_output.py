from __future__ import annotations

import subprocess
import sys

import pytest

from rsplugins.errors import ParameterError
from rsplugins.parameters import parse_settings


def test_values_are_json_where_they_can_be():
    texts = ["a=1", "b=0.5", "c=true", "d=[0.25, 0.5]", "e=soft", "f=1_000", "g=False", "h=x=y", "m.k=null", 'i="7"']
    assert parse_settings(texts, "--set") == {
        "a": 1, "b": 0.5, "c": True, "d": [0.25, 0.5], "e": "soft", "f": 1000, "g": False, "h": "x=y", "m.k": None, "i": "7",
    }  # fmt: skip


def test_a_parameter_may_be_a_fraction():
    assert parse_settings(["eps=8/255", "split=a/b", "at=1/0"], "--set") == {"eps": 8 / 255, "split": "a/b", "at": "1/0"}
    assert parse_settings(["model_dir=2026/11"], "--model-option") == {"model_dir": "2026/11"}


@pytest.mark.parametrize("texts", [["a"], ["=1"], ["a=1", "a=2"]])
def test_malformed_settings_are_refused(texts):
    with pytest.raises(ParameterError):
        parse_settings(texts, "--set")


@pytest.mark.parametrize("arguments", [["--help"], ["certify", "--help"], ["verify", "--help"]])
def test_help_needs_no_torch(arguments):
    code = "import sys; sys.modules['torch'] = None; from rsplugins.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_an_unknown_option_is_exit_code_2():
    line = [sys.executable, "-c", "from rsplugins.cli import main; main()", "verify", "--nonsense"]
    assert subprocess.run(line, capture_output=True, timeout=600).returncode == 2
