"""The files of a training run: checkpoint, metrics, curves, the model and what is known of how it was made."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsplugins.errors import RunError, UsageError
from rsplugins.machine.files import whole, write_whole
from rsplugins.models.checkpoint import own_state
from rsplugins.provenance import processor
from rsplugins.training.recipe import Recipe

CHECKPOINT, METRICS, MODEL, RECORD, CURVES, RECIPE = (
    "checkpoint.pt",
    "metrics.jsonl",
    "model.safetensors",
    "training.json",
    "curves.png",
    "recipe.toml",
)


def save_checkpoint(directory: Path, state: Mapping[str, Any]) -> None:
    """Save a checkpoint, whole or not at all."""
    with whole(directory / CHECKPOINT) as file:
        torch.save(dict(state), file)


def load_checkpoint(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the checkpoint of a directory, or None when there is none.

    Raises:
        UsageError: it belongs to another recipe; with the lines that differ.
        RunError: it is damaged.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} cannot be read: {error}", fix="Delete it to start again, or choose another --out.") from error
    if state["recipe"] != recipe.identity():
        before, now = state["recipe"].splitlines(), recipe.identity().splitlines()
        changed = [f"- {line}" for line in before if line not in now] + [f"+ {line}" for line in now if line not in before]
        raise UsageError(
            f"{directory} belongs to another recipe: {'; '.join(line for line in changed if line.strip('+- '))}.",
            cause="The recipe was changed, or two recipes share an output directory.",
            fix="Choose another --out, or delete the directory to start again.",
        )
    return state


def read_metrics(directory: Path, before_epoch: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, those of later epochs left out."""
    path = directory / METRICS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if before_epoch is None or row["epoch"] < before_epoch]


def write_metrics(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl, a row an epoch."""
    write_whole(directory / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def save_model(directory: Path, module: torch.nn.Module) -> dict[str, Any]:
    """Save the weights as safetensors, and return the file's name, sha256 and size."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in own_state(module).items()}
    data = save(state, metadata={"format": "pt"})
    write_whole(directory / MODEL, data)
    return {"file": MODEL, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write training.json, with the processor's name besides."""
    record = {"processor": processor(), **record}
    write_whole(directory / RECORD, json.dumps(record, indent=2) + "\n")


def plot_curves(directory: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw loss, accuracies and learning rate against the epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, names, label in zip(
        panels,
        (("loss",), ("train_accuracy", "test_accuracy"), ("lr",)),
        ("training loss", "accuracy", "learning rate"),
        strict=True,
    ):
        for name in names:
            points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
            if points:
                panel.plot(
                    *zip(*points, strict=True), label=name.replace("_accuracy", ""), marker="." if len(points) < 30 else None
                )
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylabel(label)
        if len(names) > 1:
            panel.legend()
    figure.suptitle(title)
    temporary = directory / f".{CURVES}.tmp.png"
    figure.savefig(temporary, dpi=120)
    temporary.replace(directory / CURVES)
