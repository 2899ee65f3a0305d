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


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["rsplugins", *words])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code


def test_the_interrupt_key_ends_a_command_with_what_to_do_next(monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rsplugins.runs.campaign.carry_out", pressed)
    assert run(monkeypatch, "certify") == 130
    said = capsys.readouterr().err
    assert "interrupted; what was computed is kept" in said
    assert "the same command resumes" in said


def test_a_new_plugin_does_not_take_a_built_in_name(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "new", "gaussian", "--directory", str(tmp_path)) == 2
    assert "There is a built-in certifier named 'gaussian'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
