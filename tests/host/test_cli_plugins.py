from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from rsplugins.cli import plugins
from rsplugins.errors import PluginError, UnknownNameError

QUIET = """
import sys
from rsplugins.cli.main import main
sys.argv = ["rsplugins", "plugins", "list", *{arguments}]
try:
    main()
finally:
    print(sorted({{name.split(".")[0] for name in sys.modules}} & {heavy}), file=sys.stderr)
"""
HEAVY = {"torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "matplotlib", "robustbench", "auto_LiRPA"}


def _list(*arguments: str) -> str:
    app = typer.Typer()
    plugins.register(app)
    result = CliRunner().invoke(app, ["plugins", "list", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def crowd(install, good):
    install("lab", good("lab", requires=("no-such-dist>=3",)))
    install("broken", "import no_such_module_at_all")
    install("fine", good("fine-but-a-long-name", "fine"), version="2026.11.21")
    install("odd", good("odd"), version="1[bold]")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--kind", "dataset"]])
def test_listing_imports_nothing_heavy(arguments):
    code = QUIET.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "digits" in done.stdout


def test_json_has_every_field(crowd):
    rows = {(row["kind"], row["name"]): row for row in json.loads(_list("--json"))}
    assert rows["certifier", "gaussian"] == {
        "name": "gaussian",
        "kind": "certifier",
        "guarantee": "probabilistic",
        "norms": ["l2"],
        "distribution": "rsplugins",
        "version": rows["certifier", "gaussian"]["version"],
        "plugin": "rsplugins",
        "status": "active",
        "reason": "",
        "fix": "",
        "summary": rows["certifier", "gaussian"]["summary"],
        "factory": "rsplugins.certifiers.gaussian:Gaussian",
        "argument": "",
    }
    lab = rows["certifier", "lab"]
    assert (lab["status"], lab["fix"], lab["norms"]) == ("unavailable", "pip install 'no-such-dist>=3'", ["linf", "l2"])
    broken = rows["plugin", "broken"]
    assert (broken["status"], broken["guarantee"], broken["version"]) == ("failed", None, "1.2")
    assert "no_such_module_at_all" in broken["reason"]
    assert rows["dataset", "folder"]["argument"] == "PATH"


def test_table_is_readable_when_piped(crowd):
    lines = _list().splitlines()
    end = next(number for number, line in enumerate(lines) if number > 2 and not line.strip())
    table, notes = lines[:end], "\n".join(lines[end:])
    assert max(map(len, table)) <= plugins.PIPED_WIDTH
    rows = {}
    for words in filter(None, map(str.split, table)):
        rows.setdefault(words[0], words)  # certifiers come first
    assert rows["gaussian"][1:4] == ["certifier", "probabilistic", "l2"]
    assert rows["gaussian"][-1] == "active"
    assert rows["fine-but-a-long-name"][-3:] == ["fine", "2026.11.21", "active"]
    assert rows["odd"][-2] == "1[bold]"
    assert rows["lab"][-3:] == ["lab", "1.2", "unavailable"]
    assert rows["broken"] == ["broken", "plugin", "broken", "1.2", "failed"]
    assert "folder:PATH" in rows
    assert "lab (certifier, lab 1.2) unavailable: no-such-dist>=3 is not installed.\n    pip install 'no-such-dist>=3'\n" in notes
    assert "broken (plugin, broken 1.2) failed: the import of 'broken' raised ModuleNotFoundError" in notes


def test_kind_filters(crowd):
    assert {row["kind"] for row in json.loads(_list("--json", "--kind", "dataset"))} == {"dataset"}
    with pytest.raises(UnknownNameError, match="Did you mean 'certifier'"):
        _list("--kind", "certifer")


def test_strict_raises_instead_of_listing(crowd, monkeypatch):
    monkeypatch.setenv("RSPLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match=r"broken 1\.2"):
        _list()
