"""The template and what ``rsplugins new`` writes: built, installed, checked, as a stranger would."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rsplugins.cli.main import build
from rsplugins.errors import ParameterError, UnknownNameError, UsageError
from rsplugins.scaffold import EXAMPLES, KINDS, write_plugin

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "plugin-template"


def install(project: Path, site: Path) -> None:
    """Build the project and install it into a folder of its own."""
    tool = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
    command = [*tool, "install", "--no-deps", "--quiet", "--target", str(site), str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check(site: Path, *arguments: str) -> tuple[int, list[dict[str, str]], str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from rsplugins.cli import main; main()", "plugins", "check", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


def test_the_template_installs_and_keeps_its_contract(tmp_path):
    install(TEMPLATE, tmp_path)
    code, outcomes, errors = check(tmp_path, "uniform-l1", "--set", "lambda_=0.5")
    assert code == 0, (outcomes, errors)
    by_name = {outcome["name"]: outcome for outcome in outcomes}
    assert by_name["soundness: half-space, 4 pixels"]["status"] == "passed"
    assert by_name["soundness: ties"]["status"] == "passed"


def test_the_template_is_short_and_depends_on_rsplugins_alone():
    lines = 0
    for path in (TEMPLATE / "src").rglob("*.py"):
        text = path.read_text()
        docstrings = sum(len((ast.get_docstring(node) or "").splitlines()) for node in ast.walk(ast.parse(text)) if _holds(node))
        lines += sum(bool(line.strip()) and not line.strip().startswith(("#", "from ", "import ")) for line in text.splitlines())
        lines -= docstrings
    assert lines < 80  # descriptor and hooks included; the method itself is under 60
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["rsplugins>=0.1"]
    assert len((TEMPLATE / "tests" / "test_contract.py").read_text().strip().splitlines()) <= 6


def _holds(node: ast.AST) -> bool:
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_works_before_anything_is_changed(kind, tmp_path):
    done = CliRunner().invoke(build(), ["new", "my-idea", "--kind", kind, "--directory", str(tmp_path)])
    assert done.exit_code == 0, done.output
    project, site = tmp_path / "my-idea", tmp_path / "site"
    install(project, site)
    more = ["--reference", EXAMPLES[kind]] if kind in EXAMPLES else []
    code, outcomes, errors = check(site, "my-idea", "--kind", kind, *more)
    assert code == 0, (outcomes, errors)
    assert sum(outcome["status"] == "passed" for outcome in outcomes) >= 6
    assert "$" not in "".join(path.read_text() for path in project.rglob("*.py"))


def test_the_programs_of_the_readme_that_add_a_certifier(tmp_path, monkeypatch):
    """Each line as it stands there; what pip would install in place is installed into a folder of its own."""
    (block,) = [
        text for text in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "rsplugins new" in text
    ]
    commands = [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split("&&")]
    assert [command[:2] for command in commands] == [["rsplugins", "new"], ["pip", "install"], ["rsplugins", "plugins"]]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(build(), commands[0][1:])
    assert done.exit_code == 0, done.output
    (folder,) = [word for word in commands[1][2:] if not word.startswith("-")]
    assert f"pip install -e {folder} " in done.output, "what it says to do next is what the page says"
    install(tmp_path / folder, tmp_path / "site")
    assert commands[2][2] == "check"
    code, outcomes, errors = check(tmp_path / "site", *commands[2][3:], "--only", "soundness: half-space, 4 pixels")
    assert (code, [outcome["status"] for outcome in outcomes]) == (0, ["passed"]), errors


def test_a_broken_plugin_ends_with_1_and_says_which_promise(tmp_path):
    write_plugin("my-idea", "certifier", tmp_path)
    project, site = tmp_path / "my-idea", tmp_path / "site"
    source = project / "src" / "rsplugins_my_idea" / "claim.py"
    source.write_text(
        source.read_text().replace("votes_claim(evidence, parameters)", "votes_claim(evidence, {**parameters, 'sigma': 1})")
    )
    install(project, site)
    code, outcomes, _ = check(site, "my-idea", "--only", "4 pixels")
    assert code == 1
    assert any(outcome["status"] == "failed" and outcome["name"].startswith("soundness") for outcome in outcomes)


def test_names_and_places_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'certifier'"):
        write_plugin("a", "certifer", tmp_path)
    for name in ("My-Idea", "1st", "a b", "class", "../up"):
        with pytest.raises(ParameterError):
            write_plugin(name, "certifier", tmp_path)
    write_plugin("once", "certifier", tmp_path)
    with pytest.raises(UsageError, match="exists"):
        write_plugin("once", "certifier", tmp_path)
