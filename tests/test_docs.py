"""The documentation names every hook with its exact signature, and has a page for every certifier."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rsplugins
from rsplugins.host import get_host
from rsplugins.host.hookspecs import RETURNS
from rsplugins.parameters import parse_settings, plain
from rsplugins.training import ImageTable, Trainer
from rsplugins.training.hooks import TrainingHookSpecs
from rsplugins.training.recipe import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainingSettings,
    load_recipe,
)

DOCS = Path(__file__).parents[1] / "docs"
HOOKS = (DOCS / "hooks.md").read_text()
TRAINING = [name for name in vars(TrainingHookSpecs) if not name.startswith("_")]


def section(name: str) -> str:
    found = re.search(rf"^##+ {name}\n(.*?)(?=^##+ |\Z)", HOOKS, re.M | re.S)
    assert found, f"docs/hooks.md has no section {name}"
    return found[1]


@pytest.mark.parametrize("hook", RETURNS)
def test_every_hook_is_documented_with_its_signature_and_fields(hook):
    text = section(hook)
    assert f"`{hook}() -> Sequence[{RETURNS[hook].__name__}]`" in text
    for field in dataclasses.fields(RETURNS[hook]):
        assert f"| `{field.name}` | `{field.type}` |" in text, f"{hook}: {field.name}"


@pytest.mark.parametrize("hook", TRAINING)
def test_every_training_hook_is_documented_with_its_signature(hook):
    signature = str(inspect.signature(getattr(TrainingHookSpecs, hook))).replace("'", "")
    assert f"`{hook}{signature}`" in section(hook)


@pytest.mark.parametrize("hook", [*RETURNS, *TRAINING])
def test_every_example_is_a_program(hook):
    examples = re.findall(r"```python\n(.*?)```", section(hook), re.S)
    assert examples
    for example in examples:
        ast.parse(example)
        assert f"def {hook}(" in example


def test_no_section_is_about_a_hook_that_does_not_exist():
    assert set(re.findall(r"^## (rsplugins_\w+)$", HOOKS, re.M)) == set(RETURNS)


METHODS = (DOCS / "methods" / "training.md").read_text()


HOOK_NAMES = [entry.name for entry in get_host().entries("training-hook") if entry.distribution == "rsplugins"]


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_every_training_hook_has_a_section_and_its_recipe_keys(name):
    assert re.search(rf"^## .*`{re.escape(name)}`", METHODS, re.M), f"docs/methods/training.md has no section about {name}"
    row = re.search(rf"^\| `{re.escape(name)}` \| (.*) \|$", METHODS, re.M)
    assert row, f"the table of recipe keys lacks {name}"
    written = dict(part.partition(" = ")[::2] for part in re.findall(r"`([^`]+)`", row[1]))
    fields = [field for field in dataclasses.fields(get_host().find("training-hook", name).load()) if field.init]
    assert set(written) == {field.name for field in fields}
    for field in fields:
        has_value = field.default is not dataclasses.MISSING and field.default is not None
        expected = {field.name: plain(field.default)} if has_value else {}
        assert parse_settings([f"{field.name}={written[field.name]}"] if written[field.name] else [], "--set") == expected


TABLES = [DataSettings, EvaluationSettings, ModelSettings, OptimizerSettings, ScheduleSettings, TrainingSettings]


@pytest.mark.parametrize("settings", TABLES)
def test_the_page_of_recipes_has_every_key_with_its_default(settings):
    name = f"[{settings.__name__.removesuffix('Settings').lower()}]"
    page = (DOCS / "recipes.md").read_text()
    part = re.search(rf"^### `{re.escape(name)}`\n(.*?)(?=^#|\Z)", page, re.M | re.S)
    assert part, f"docs/recipes.md has no table {name}"
    written = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", part[1], re.M))
    fields = dataclasses.fields(settings)
    assert list(written) == [field.name for field in fields]
    for field in fields:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            assert written[field.name] == "required"
        elif default is None:
            assert not written[field.name].strip()
        else:
            assert parse_settings([f"{field.name}={written[field.name].strip('`')}"], "--set") == {field.name: plain(default)}


def test_the_recipe_on_the_page_trains_a_step(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(re.search(r"```toml\n(name = .*?)```", (DOCS / "recipes.md").read_text(), re.S)[1])
    found = load_recipe(path)
    images = ImageTable(torch.rand(2, 1, 28, 28), torch.arange(2), 10)
    trainer = Trainer(found, tmp_path / "run", device="cpu", train=images, test=images, quiet=True)
    trainer.engine.step(images.images, images.labels, found.training.epochs - 1, 0)
    assert math.isfinite(trainer.engine.numbers()["loss"])


def test_every_test_that_the_page_of_training_methods_names_exists():
    tests = "".join(path.read_text() for path in (DOCS.parent / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", METHODS))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("name", [entry.name for entry in get_host().entries("certifier") if entry.distribution == "rsplugins"])
def test_every_certifier_has_a_page_of_its_method(name):
    pages = {path: path.read_text() for path in DOCS.rglob("*.md") if path.name not in ("hooks.md", "contract.md")}
    headed = [path for path, text in pages.items() if re.search(rf"^#+ .*(?<![\w-]){re.escape(name)}(?![\w-])", text, re.M)]
    named = [path for path, text in pages.items() if re.search(rf"`{re.escape(name)}`", text)]
    assert headed or named, f"no page under docs/ is about {name}"


def test_the_measured_tables_are_those_of_the_zoo():
    script = DOCS.parent / "zoo" / "tables.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout.split("\n")
    page = (DOCS / "methods" / "training.md").read_text().splitlines()
    assert sum("| `mnist-" in line for line in printed) >= 6
    assert [line for line in printed if line and line not in page] == []


def test_the_programs_on_the_page_about_python_run_and_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for program in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S):
        exec(program, names)
    result, run = names["result"], names["run"]
    assert result["inputs"] == len(run.rows) == 6
    assert result["acr"] == run.summary()["acr"] > 0
    before = Path("runs/digits/records.jsonl").read_bytes()
    call = re.search(r"^run = rsplugins.certify\(.*$", (DOCS / "python.md").read_text(), re.M)
    names["data"] = rsplugins.load_data("digits")
    exec(call[0], names)
    assert Path("runs/digits/records.jsonl").read_bytes() == before, "the same call resumes"
    assert names["run"].rows == run.rows


def test_the_page_of_layers_is_what_the_tables_say():
    spec = importlib.util.spec_from_file_location(
        "layers", Path(__file__).resolve().parents[1] / "docs" / "scripts" / "layers.py"
    )
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    assert layers.PAGE.read_text(encoding="utf-8") == layers.text()
