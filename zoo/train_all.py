"""Train, evaluate and pack several models inside one time budget, on a machine with torch and little else.

    python zoo/train_all.py zoo/recipes/*.cifar10-jpeg-*.toml --out OUT --time-budget 9 --data-root data

Each model gets OUT/NAME/ with weights, recipe, curves and the records behind every number, small enough to carry home, where
`rsplugins zoo add OUT/NAME` makes the zoo's folder of it. Nothing has to be installed: the checkout's own package is used
where there is no other, and only recipes with an orthogonal encoder need a package beside it (orthogonium). All models are
trained first, in the order given; then all are measured, in the time that is left. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

if importlib.util.find_spec("rsplugins") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rsplugins.errors import RspluginsError
from rsplugins.training.packing import pack
from rsplugins.training.recipe import DataSettings, load_recipe, parse_overrides
from rsplugins.training.trainer import Trainer, TrainingResult


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns 0, or 1 when a model failed."""
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
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.time_budget
    overrides = parse_overrides(options.set)
    recipes = [load_recipe(path, overrides) for path in options.recipes]
    runs = options.runs or options.out / ".runs"

    tables: dict[DataSettings, dict[str, Any]] = {}
    trained: list[tuple[TrainingResult, Trainer]] = []
    failed = 0
    for recipe in recipes:
        left = deadline - time.monotonic()
        if left <= 0:
            _say(f"{recipe.name}: not begun, the time budget is spent")
            continue
        key = dataclasses.replace(recipe.data, crop=0, flip=False)  # which happen after the table
        try:
            trainer = Trainer(
                recipe, runs / recipe.name, device=options.device, data_root=options.data_root, **tables.get(key, {})
            )
            # The next recipe on the same data takes the tables that are already on the device.
            tables[key] = {"train": trainer.train, "test": trainer.test}
            trained.append((trainer.fit(left), trainer))
        except RspluginsError as error:
            failed += 1
            _say(f"{recipe.name}: FAILED: {error}")
    for result, trainer in trained:
        recipe = trainer.recipe
        if result.status != "finished":
            _say(f"{recipe.name}: stopped after {result.record['epochs']} of {recipe.training.epochs} epochs, not measured")
            continue
        found = pack(result, recipe, trainer.test, options.out / recipe.name, deadline=deadline, dtype=options.dtype, say=_say)
        sys.stdout.write(json.dumps({"name": recipe.name, "minutes": result.record["minutes"], **found}) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
