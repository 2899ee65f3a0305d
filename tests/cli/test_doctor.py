from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from rsplugins.cli import doctor


def run(*arguments):
    app = typer.Typer()
    doctor.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_the_doctor_lists_versions_devices_and_the_zoo():
    found = json.loads(run("--json").stdout)
    assert {"python", "torch", "pydantic", "typer"} <= found["versions"].keys()
    assert found["devices"][0].startswith("cpu: ")
    assert found["zoo"]["default model"].startswith("zoo:")


def test_a_missing_part_comes_with_the_line_that_adds_it(monkeypatch):
    monkeypatch.setitem(doctor._OPTIONAL, "video", ("moving pictures", ("no-such-distribution>=2",)))
    text = run().stdout
    assert "needed for moving pictures" in text
    assert "pip install" in text.split("moving pictures")[1].splitlines()[1]


def test_a_data_root_is_listed(monkeypatch, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setenv("RSPLUGINS_DATA", str(tmp_path))
    assert doctor.diagnose()["data"]["holds"] == "cifar-10-batches-py"


def test_a_reader_that_stops_early_gets_no_traceback():
    import subprocess
    import sys

    program = "from rsplugins.cli import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, "plugins", "list"], **pipes) as lister:
        lister.stdout.close()
        assert "Traceback" not in lister.stderr.read()
    assert lister.returncode in (0, 1)  # rich ends with 1 when nobody reads on
