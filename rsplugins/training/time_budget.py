"""Several recipes inside one time budget."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsplugins.training.recipe import Recipe
from rsplugins.training.trainer import Trainer, TrainingResult


def train_all(
    recipes: Sequence[Recipe],
    folders: Sequence[Path],
    *,
    device: str = "auto",
    data_root: str | Path | None = None,
    time_budget: float | None = None,
    quiet: bool = False,
) -> Iterator[TrainingResult]:
    """Train recipes one after another, and yield each result as it is there.

    Each may use what is left of the budget; when it is spent, the later recipes are not begun.

    Args:
        recipes: what to train.
        folders: a directory for each.
        device: see :class:`~rsplugins.training.trainer.Trainer`.
        data_root: where data sets are looked for.
        time_budget: seconds for all.
        quiet: show no progress.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    for recipe, folder in zip(recipes, folders, strict=True):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        yield Trainer(recipe, folder, device=device, data_root=data_root, quiet=quiet).fit(left)
