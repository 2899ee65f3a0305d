"""Train and measure several models inside one time budget.

    python zoo/train_all.py zoo/recipes/*.cifar10-jpeg-*.toml --out OUT --time-budget 9 --data-root data

Each model gets OUT/NAME/ with weights, recipe, curves and runs/, one run a method behind its numbers, where `rsplugins zoo add
OUT/NAME` makes the zoo's folder of it. Checkpoints stay in OUT/.runs. Nothing has to be installed but the dependencies: the
checkout's own package is used where there is no other, and only recipes with an orthogonal encoder need a package beside it
(orthogonium). All models are trained first, in the order given, and stored as soon as they are; then all are measured, in the
time that is left. A model that fails, in whatever way, does not keep the others from their turn. The same command goes on where
it stopped.

Where few and small files come back from the machine, bring one archive in parts, and give an upper limit from outside:

    timeout 570 python zoo/train_all.py RECIPE --out OUT --time-budget 9 --dtype bfloat16 --data-root data
    tar -c --exclude .runs -C OUT . | split -b 15000000 - HOME/models.tar.
    # and at home: mkdir models && cat models.tar.* | tar -x -C models
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("rsplugins") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rsplugins.certification import prepare
from rsplugins.certifier import Execution
from rsplugins.classifier import Classifier
from rsplugins.data import load
from rsplugins.errors import RspluginsError, UsageError
from rsplugins.host import get_host
from rsplugins.machine.progress import Advance, Lines
from rsplugins.parameters import parse_settings
from rsplugins.runs.campaign import carry_out_one
from rsplugins.runs.run import open_run
from rsplugins.training.recipe import DataSettings, Recipe, load_recipe
from rsplugins.training.trainer import Trainer, TrainingResult
from rsplugins.zoo.weights import store


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="a folder for each model inside")
    parser.add_argument("--runs", type=Path, help="where checkpoints stay; default OUT/.runs")
    parser.add_argument("--time-budget", type=float, default=9.0, help="minutes for everything")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="arithmetic of the certified function"
    )
    parser.add_argument("--set", action="append", default=[], help="TABLE.KEY=VALUE for every recipe")
    return parser.parse_args(arguments)


class _UntilDeadline(Lines):
    """Shows progress, and ends a run at the first record after a deadline; what was recorded is kept."""

    def __init__(self, deadline: float) -> None:
        super().__init__(sys.stderr, every=30.0)
        self.deadline = deadline

    @contextmanager
    def task(self, title: str, total: int, done: int = 0, unit: str = "inputs") -> Iterator[Advance]:
        """Start a task."""
        with super().task(title, total, done, unit) as advance:

            def checked() -> None:
                advance()
                if time.monotonic() >= self.deadline:
                    raise TimeoutError

            yield checked


def wanted(recipe: Recipe, inputs: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield method, parameters and stride of what a recipe's [evaluation] asks for; predictions always."""
    asked = recipe.evaluation
    yield "predict", {}, 1
    if asked.sigma is not None:
        yield "gaussian", {"sigma": asked.sigma, "n": asked.n}, asked.stride
    if asked.eps is not None:
        yield "attack", {"eps": asked.eps}, max(1, inputs // asked.images)


class Models:
    """The models of one call: trained one after the other, then measured.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.deadline = options, time.monotonic() + 60 * options.time_budget
        self.failed = 0
        self._runs: Path = options.runs or options.out / ".runs"
        self._tables: dict[DataSettings, dict[str, Any]] = {}
        self._trained: list[tuple[TrainingResult, Trainer, Classifier]] = []

    def train(self, recipe: Recipe) -> None:
        """Train a model and store it; without torch.compile where that fails."""
        try:
            self._train(recipe, recipe.name)
        except Exception as error:  # out of memory, a compiler that is missing: the other models get their turn
            retry = recipe.training.compile and not isinstance(error, RspluginsError)
            self._fails(recipe, "compiled; it is trained without torch.compile" if retry else "in training", error)
            if retry:
                self.failed -= 1
                self.train(dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, compile=False)))

    def _train(self, recipe: Recipe, name: str) -> None:
        key = dataclasses.replace(recipe.data, crop=0, flip=False)  # which happen after the table
        directory = self._runs / f"{name}{'-compiled' if recipe.training.compile else ''}"
        device, root = self.options.device, self.options.data_root
        trainer = Trainer(recipe, directory, device=device, data_root=root, **self._tables.get(key, {}))
        # The next recipe on the same data takes the tables that are already on the device.
        self._tables[key] = {"train": trainer.train, "test": trainer.test}
        result = trainer.fit(self.deadline - time.monotonic())
        if result.status == "finished":
            self._trained.append((result, trainer, store(result, trainer.test, self.options.out / name)))
        else:
            _say(f"{name}: stopped after {result.record['epochs']} of {recipe.training.epochs} epochs, not measured")

    def measure(self) -> None:
        """Measure what was trained, and print a line for each model."""
        for result, trainer, classifier in self._trained:
            recipe, found = trainer.recipe, {}
            try:
                for method, parameters, stride in wanted(recipe, len(trainer.test)):
                    found[method] = self._run(classifier, trainer, method, parameters, stride)
            except Exception as error:  # its weights are stored; what was measured before is kept
                self._fails(recipe, "in measuring", error)
                continue
            sys.stdout.write(json.dumps({"name": recipe.name, "minutes": result.record["minutes"], **found}) + "\n")

    def _run(
        self, classifier: Classifier, trainer: Trainer, method: str, parameters: dict[str, Any], stride: int
    ) -> dict[str, Any]:
        recipe, options = trainer.recipe, self.options
        data = recipe.data
        dataset = load(data.name, root=options.data_root, split=data.test, input_size=data.input_size)
        entry, dtype = get_host().find("certifier", method), options.dtype if method == "gaussian" else "float32"
        directory = options.out / recipe.name / "runs" / method
        classifier.to(trainer.device)
        try:
            certifier = prepare(entry, classifier, parameters, Execution(dtype=dtype))
        except UsageError as error:
            if not parameters.get("autoattack", True):
                raise
            _say(f"{recipe.name}: attacked without AutoAttack: {error}")
            return self._run(classifier, trainer, method, {**parameters, "autoattack": ()}, stride)
        indices, shown = range(0, len(dataset), stride), _UntilDeadline(self.deadline)
        try:
            run = carry_out_one(entry, certifier, dataset, indices, directory, data=data.name, progress=shown)
        except TimeoutError:
            run = open_run(directory)
        summary = run.summary()
        return {key: summary[key] for key in ("inputs", "missing", "accuracy", "acr", "attacks") if key in summary}

    def _fails(self, recipe: Recipe, when: str, error: Exception) -> None:
        """Say that a model failed: with a traceback where the error does not say itself what to do."""
        self.failed += 1
        if not isinstance(error, RspluginsError):
            traceback.print_exception(error)
        _say(f"{recipe.name}: FAILED {when}: {error}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns 0, or 1 when a model failed."""
    options = _options(arguments)
    overrides = parse_settings(options.set, "--set")
    recipes = [load_recipe(path, overrides) for path in options.recipes]
    models = Models(options)
    for recipe in recipes:
        if time.monotonic() < models.deadline:
            models.train(recipe)
        else:
            _say(f"{recipe.name}: not begun, the time budget is spent")
    models.measure()
    return int(models.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
