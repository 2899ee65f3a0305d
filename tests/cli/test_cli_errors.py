from __future__ import annotations

import sys

import pytest

import rsplugins
from rsplugins.cli import main


def test_an_output_that_cannot_be_written_is_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    words = ["certify", "--method", "gaussian", "--set", "n=20", "--stop", "1", "--out", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", ["rsplugins", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1
    assert f"the file system refuses {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rsplugins", "--version"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert capsys.readouterr().out == f"rsplugins {rsplugins.__version__}\n"
