"""From the records that a model ships to every number of its manifest. No torch, no model.

``records/NAME/`` holds a run each, ``manifest.json`` and ``records.jsonl`` with a line an input: of a certifier, of an attack, or
of the model's own predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import CheckpointError
from rsplugins.models.files import sha256
from rsplugins.models.manifest import Result
from rsplugins.rounding import round_down, round_up
from rsplugins.runs.record import RECORDS
from rsplugins.runs.run import Run, open_run
from rsplugins.runs.seals import MANIFEST
from rsplugins.runs.summary import average_radius, certified_count, interval, summarise


def names(folder: Path) -> list[str]:
    """Return the names of a model's evidence, predictions first: the accuracy of a model is that over most inputs."""
    found = (path.name for path in (folder / "records").glob("*") if path.is_dir())
    return sorted(found, key=lambda name: (not name.startswith("predict"), name))


def place(folder: Path, name: str) -> Path:
    """Return the run directory of one piece of evidence.

    Raises:
        CheckpointError: it is none.
    """
    found = folder / "records" / name
    if not all((found / file).is_file() for file in (MANIFEST, RECORDS)):
        raise CheckpointError(
            f"{found} holds no evidence.",
            cause=f"It needs {MANIFEST} and {RECORDS}.",
            fix="Restore the files, or remove the folder and its results.",
        )
    return found


def function_sha256(folder: Path, name: str) -> str:
    """Return the fingerprint of the classifier that the evidence is about."""
    found = read_json(place(folder, name) / MANIFEST).get("model", {}).get("sha256")
    return str(found or "")


def measure(folder: Path, name: str) -> list[Result]:
    """Return every number that follows from one piece of evidence.

    Args:
        folder: of the model.
        name: of the evidence.

    Raises:
        CheckpointError, RunError: it is not there, or cannot be read.
    """
    directory = place(folder, name)
    shared = {"records": name, "records_sha256": sha256(directory / RECORDS)}
    try:
        return [Result.model_validate({**row, **shared}) for row in _numbers(open_run(directory))]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} cannot be read: {type(error).__name__}: {error}.", fix="Restore its files."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", fix="Restore it.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object.", fix="Restore it.")
    return value


def _numbers(run: Run) -> Iterator[dict[str, Any]]:
    if run.manifest.imported is not None:
        raise ValueError("it was imported from another program's log, which shows no evidence")
    if run.missing or run.strays:
        raise ValueError(f"{len(run.missing)} inputs of the selection have no record, {len(run.strays)} others have one")
    if run.problems:
        raise ValueError(f"it was edited: {run.problems[0]}")
    summary, manifest = summarise(run), run.manifest
    guarantee = Guarantee(summary["guarantee"])
    shared = {
        "data": manifest.data["reference"],
        "split": manifest.data.get("split", "test"),
        "images": len(run.rows),
        **({} if manifest.selection.listed is not None else {"stride": manifest.selection.stride}),
        "version": " ".join(manifest.plugin.get(key, "") for key in ("distribution", "version")).strip(),
        "device": device(manifest.execution),
    }
    if guarantee in (Guarantee.EMPIRICAL, Guarantee.NONE):
        yield {**shared, "metric": "accuracy", **_rate(summary["correct"], len(run.rows))}
        yield from _attacked(run, shared)
        return
    shared |= {
        "guarantee": guarantee,
        "norm": Norm(summary["norm"]),
        "sigma": summary["sigma"],
        "alpha": summary["alpha"] if guarantee is Guarantee.PROBABILISTIC else None,
        "n": summary["n"],
        "certifier": manifest.method,
    }
    certified, mean = ("certified_accuracy", "acr") if guarantee.certifies else ("accuracy_at_estimated_radius", "mean_estimate")
    eps = manifest.parameters.get("eps")
    if eps is None:
        radii = [row.radius if row.correct else 0.0 for row in run.rows]
        value = average_radius(run.rows)
        spread = 1.959964 * _deviation(radii) / math.sqrt(len(radii))
        yield {
            **shared,
            "metric": mean,
            "value": _down(value),
            "interval": (_down(max(0.0, value - spread)), _up(value + spread)),
        }
    for radius in [point["radius"] for point in summary["curve"]] if eps is None else [eps]:
        yield {**shared, "metric": certified, "radius": radius, **_rate(certified_count(run.rows, radius), len(run.rows))}


def _attacked(run: Run, shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the accuracy under each attack of a run; nothing for one of predictions."""
    survived = [row.record.evidence["survived"] for row in run.rows if "survived" in row.record.evidence]
    if not survived:
        return
    # With every attack for every input: a number over chosen inputs would be about something else.
    if len(survived) != len(run.rows) or any(kept.keys() != survived[0].keys() for kept in survived):
        raise ValueError("its inputs were not all attacked in the same way")
    parameters = run.manifest.parameters
    titles = {"pgd": f"PGD-{parameters['steps']}", "margin": f"PGD-{parameters['steps']} on the margin"}
    titles["autoattack"] = f"AutoAttack ({', '.join(parameters['autoattack'])})"
    for key, title in titles.items():
        if key in survived[0]:
            claim = {"guarantee": Guarantee.EMPIRICAL, "norm": Norm.LINF, "radius": parameters["eps"], "certifier": title}
            count = sum(kept[key] for kept in survived)
            yield {**shared, **claim, "metric": "accuracy_under_attack", **_rate(count, len(survived))}


def device(execution: dict[str, Any]) -> str:
    """Return ``"cpu"`` or the name of the GPU from what a run's manifest says."""
    return "cpu" if execution.get("device", "cpu") == "cpu" else str(execution.get("device_name") or execution["device"])


def _rate(count: int, total: int) -> dict[str, Any]:
    low, high = interval(count, total)
    return {"value": round(count / total, 6), "interval": (_down(low), _up(high))}


def _deviation(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def _down(value: float) -> float:
    return float(round_down(value, 6))


def _up(value: float) -> float:
    return float(round_up(value, 6))
