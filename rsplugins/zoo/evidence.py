"""From the records that a model ships to every number of its manifest. No torch, no model.

``records/NAME/`` holds one of three kinds of evidence, an entry an input each:

* ``manifest.json`` and ``records.jsonl``: a run of ``rsplugins certify``;
* ``attack.json`` and ``attacked.jsonl``: an attack of ``rsplugins attack``;
* ``predictions.json``: the classes predicted without noise.
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
from rsplugins.runs.summary import average_radius, certified_count, interval, summarise

PREDICTIONS, ATTACK, ATTACKED, RUN = "predictions.json", "attack.json", "attacked.jsonl", "manifest.json"


def names(folder: Path) -> list[str]:
    """Return the names of a model's evidence."""
    return sorted(path.name for path in (folder / "records").glob("*") if path.is_dir())


def files(folder: Path, name: str) -> list[Path]:
    """Return the files of one piece of evidence, those with an entry an input last."""
    place = folder / "records" / name
    for group in ((RUN, RECORDS), (ATTACK, ATTACKED), (PREDICTIONS,)):
        if all((place / file).is_file() for file in group):
            return [place / file for file in group]
    raise CheckpointError(
        f"{place} holds no evidence.",
        cause=f"It needs {RUN} and {RECORDS}, {ATTACK} and {ATTACKED}, or {PREDICTIONS}.",
        fix="Restore the files, or remove the folder and its results.",
    )


def function_sha256(folder: Path, name: str) -> str:
    """Return the fingerprint of the classifier that the evidence is about."""
    head = read_json(files(folder, name)[0])
    found = head["settings"].get("weights") if "settings" in head else head.get("model", {}).get("sha256")
    return str(found or "")


def measure(folder: Path, name: str) -> list[Result]:
    """Return every number that follows from one piece of evidence.

    Args:
        folder: of the model.
        name: of the evidence.

    Raises:
        CheckpointError, RunError: it is not there, or cannot be read.
    """
    found = files(folder, name)
    shared = {"records": name, "records_sha256": sha256(found[-1])}
    kind = found[0].name
    try:
        rows = _run(open_run(found[0].parent)) if kind == RUN else _attack(found) if kind == ATTACK else _predictions(found[0])
        return [Result.model_validate({**row, **shared}) for row in rows]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{found[0].parent} cannot be read: {type(error).__name__}: {error}.", fix="Restore its files."
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


def _run(run: Run) -> Iterator[dict[str, Any]]:
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
        "guarantee": guarantee,
        "norm": Norm(summary["norm"]),
        "sigma": summary["sigma"],
        "alpha": summary["alpha"] if guarantee is Guarantee.PROBABILISTIC else None,
        "n": summary["n"],
        "certifier": manifest.method,
        "version": " ".join(manifest.plugin.get(key, "") for key in ("distribution", "version")).strip(),
        "device": device(manifest.execution),
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


def _attack(found: list[Path]) -> Iterator[dict[str, Any]]:
    head = read_json(found[0])
    settings, ran = head["settings"], head["ran"]
    rows = [json.loads(line) for line in found[1].read_text(encoding="utf-8").splitlines()]
    # Every input of the attack once, with every attack: a number over chosen inputs would be about something else.
    stride = settings.get("stride", 1)  # earlier attacks took the first inputs
    planned = list(range(0, stride * settings["images"], stride))
    if [row["index"] for row in rows] != planned or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"the inputs are not 0 to {planned[-1]} in steps of {stride}, each once and with the same attacks")
    shared = {"data": settings["data"], "split": settings["split"], "images": len(rows), "device": ran["device"]}
    shared |= {"stride": stride} if "stride" in settings else {}
    shared["version"] = ", ".join(f"{key} {value}" for key, value in ran["versions"].items() if key != "python")
    yield {**shared, "metric": "accuracy", **_rate(sum(row["clean"] for row in rows), len(rows))}
    attacked = {"pgd": f"PGD-{settings['steps']}", "margin": f"PGD-{settings['steps']} on the margin"}
    attacked["autoattack"] = f"AutoAttack ({', '.join(settings['autoattack'])})"
    for key, title in attacked.items():
        if rows and key in rows[0]:
            claim = {"guarantee": Guarantee.EMPIRICAL, "norm": Norm.LINF, "radius": settings["eps"], "certifier": title}
            yield {**shared, **claim, "metric": "accuracy_under_attack", **_rate(sum(row[key] for row in rows), len(rows))}


def _predictions(path: Path) -> Iterator[dict[str, Any]]:
    head = read_json(path)
    pairs = list(zip(head["labels"], head["predictions"], strict=True))
    count = sum(label == predicted for label, predicted in pairs)
    data = head["data"]
    shared = {"data": data["reference"], "split": data["split"], "images": len(pairs), "device": head["device"]}
    shared["version"] = ", ".join(f"{key} {value}" for key, value in head["versions"].items() if key != "python")
    yield {**shared, "metric": "accuracy", **_rate(count, len(pairs))}


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
