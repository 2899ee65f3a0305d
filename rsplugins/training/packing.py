"""From a finished run to a zoo folder: weights in half precision where that loses nothing, and the evidence behind every number.

Needs neither pydantic nor auto-LiRPA, so that it runs where the model is trained. The folder holds ``model.safetensors``,
``recipe.toml``, ``training.json``, ``metrics.jsonl``, ``curves.png``, ``evaluation.json`` and ``records/``; the zoo's manifest is
written from these.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rsplugins.certificate import Guarantee
from rsplugins.classifier import Classifier
from rsplugins.data.table import Table
from rsplugins.errors import UsageError
from rsplugins.execution import Execution
from rsplugins.machine.device import device_name
from rsplugins.machine.files import write_whole
from rsplugins.sampling import Draw, GaussianNoise, Program, Sampler
from rsplugins.statistics import claims
from rsplugins.training import files, robustness
from rsplugins.training.files import versions
from rsplugins.training.recipe import EvaluationSettings, Recipe
from rsplugins.training.trainer import TrainingResult, accuracy

ALPHA, N0 = 0.001, 100
CERTIFIED, EVALUATION = "gaussian.jsonl", "evaluation.json"
LOSSLESS = 0.002
"""Accuracy that half precision may cost before float32 weights are kept."""


def half_precision(classifier: Classifier, test: Table) -> tuple[Classifier, str]:
    """Return the classifier with weights rounded to float16, and ``"float16"``; as it is, and ``"float32"``, where that costs.

    The weights are float32 again, with values that float16 holds: what is measured is what is stored.

    Args:
        classifier: in eval mode.
        test: on which the cost is measured.
    """
    rounded = copy.deepcopy(classifier)
    with torch.no_grad():
        for tensor in (*rounded.module.parameters(), *rounded.module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
    finite = all(bool(tensor.isfinite().all()) for tensor in rounded.module.state_dict().values())
    if finite and abs(accuracy(rounded, test) - accuracy(classifier, test)) <= LOSSLESS:
        return rounded, "float16"
    return classifier, "float32"


def pack(
    result: TrainingResult,
    recipe: Recipe,
    test: Table,
    folder: Path,
    *,
    deadline: float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Store and measure a trained model: :func:`store`, then :func:`measure`.

    Args:
        result: of :meth:`~rsplugins.training.trainer.Trainer.fit`.
        recipe: what was trained; its ``[evaluation]`` says what is measured.
        test: the test split, on the model's device.
        folder: where everything goes.
        deadline: of ``time.monotonic``; what is not measured then is left out, and said in ``evaluation.json``.
        dtype: arithmetic of the sampling; part of the function that is certified.
        say: where progress goes.

    Returns:
        What ``evaluation.json`` holds.
    """
    return measure(store(result, test, folder), recipe, test, folder, deadline=deadline, dtype=dtype, say=say)


def store(result: TrainingResult, test: Table, folder: Path) -> Classifier:
    """Store a trained model with its accuracy, so that nothing that happens while measuring can lose it.

    Args:
        result: of :meth:`~rsplugins.training.trainer.Trainer.fit`.
        test: the test split, on the model's device.
        folder: where everything goes.

    Returns:
        The classifier with the weights as stored.
    """
    (folder / "records").mkdir(parents=True, exist_ok=True)
    classifier, stored = half_precision(result.classifier, test)
    weights = _save(folder, classifier.module, stored)
    for name in (files.RECIPE, files.METRICS, files.CURVES):
        if (result.directory / name).exists():
            shutil.copyfile(result.directory / name, folder / name)
    files.write_record(folder, {**result.record, "weights": weights})
    found: dict[str, Any] = {
        "accuracy": accuracy(classifier, test),
        "images": len(test),
        "device": device_name(test.labels.device),
        "versions": versions(),
        "weights": classifier.fingerprint(),
    }
    _write(folder, found)
    return classifier


def measure(
    classifier: Classifier,
    recipe: Recipe,
    test: Table,
    folder: Path,
    *,
    deadline: float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure what :func:`store` stored; the same call goes on where an earlier one stopped. Arguments: see :func:`pack`."""
    records = folder / "records"
    found: dict[str, Any] = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    if recipe.evaluation.sigma is not None:
        say(f"{recipe.name}: certifying at sigma {recipe.evaluation.sigma:g}")
        found["gaussian"] = certify(classifier, test, recipe.evaluation, records / CERTIFIED, deadline=deadline, dtype=dtype)
        _write(folder, found)
    if recipe.evaluation.eps is not None:
        found["attack"] = _attack(classifier, test, recipe, records, deadline, say)
        _write(folder, found)
    return found


def _write(folder: Path, found: dict[str, Any]) -> None:
    write_whole(folder / EVALUATION, (json.dumps(found, indent=2) + "\n").encode())


def certify(
    classifier: Classifier,
    test: Table,
    settings: EvaluationSettings,
    path: Path,
    *,
    deadline: float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Gather the votes of the certifier ``gaussian`` for every stride-th test input, a record a line, and sum them up.

    The evidence is what ``rsplugins certify --method gaussian`` gathers with the same parameters.

    Args:
        classifier: on the device of ``test``.
        test: the test split.
        settings: sigma, n and stride.
        path: of the records; inputs that have one are not sampled again.
        deadline: of ``time.monotonic``; later inputs are left for another call.
        dtype: arithmetic of the sampling.
        seed: of the noise.

    Returns:
        Parameters, how many inputs are done and planned, ACR and certified accuracies.

    Raises:
        UsageError: the records belong to other weights or parameters.
    """
    assert settings.sigma is not None
    indices = list(range(0, len(test), settings.stride))
    parameters = {"sigma": settings.sigma, "n0": N0, "n": settings.n, "alpha": ALPHA, "stop_at": []}
    header = {
        "parameters": parameters,
        "seed": seed,
        "dtype": dtype,
        "weights": classifier.fingerprint(),
        "stride": settings.stride,
    }
    rows = _resume(path, header)
    noise = GaussianNoise(settings.sigma, seed)
    sampler = Sampler(classifier, noise, classifier.num_classes, Execution(seed=seed, dtype=dtype))

    def work() -> Iterator[tuple[int, torch.Tensor, Program]]:
        for index in indices[len(rows) :]:
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield index, test.take(torch.tensor([index]))[0][0], _votes(settings.n)

    with path.open("a", encoding="utf-8") as file:
        for gathered in sampler.run(work()):
            label = int(test.labels[gathered.index])
            row = {"index": gathered.index, "label": label, "evidence": dict(gathered.evidence), "samples": gathered.samples}
            row |= {"seconds": round(gathered.seconds, 6), "error": gathered.error}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
            file.flush()
            rows.append(row)
    summary = {**header, "guarantee": str(Guarantee.PROBABILISTIC), "norm": "l2", "done": len(rows), "planned": len(indices)}
    return {**summary, **score(rows, parameters), "records_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def score(rows: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return ACR over all inputs and certified accuracy by radius, recomputed from records."""
    radii = []
    for row in rows:
        claim = claims.gaussian(row["evidence"], parameters) if row["error"] is None else None
        right = claim is not None and claim.prediction == row["label"]
        radii.append(claim.radius if claim is not None and right else -1.0)
    count = max(1, len(radii))
    grid = [0.25 * step for step in range(int(4 * max([0.0, *radii])) + 1)]
    return {
        "acr": sum(max(0.0, radius) for radius in radii) / count,
        "certified_accuracy": {f"{at:g}": sum(radius >= at for radius in radii) / count for at in grid},
    }


def _votes(n: int) -> Program:
    selection = yield Draw(0, N0)
    estimation = yield Draw(N0, N0 + n)
    return {"selection": selection.votes(), "estimation": estimation.votes()}


def _attack(
    classifier: Classifier, test: Table, recipe: Recipe, records: Path, deadline: float | None, say: Callable[[str], None]
) -> dict[str, Any]:
    settings = robustness.AttackSettings(eps=recipe.evaluation.eps or 0.0, images=recipe.evaluation.images)
    identity = {"model": recipe.name, "weights": classifier.fingerprint()}

    def progress(done: int, total: int) -> None:
        say(f"{recipe.name}: attacked {done} of {total} inputs")
        if deadline is not None and done < total and time.monotonic() >= deadline:
            raise TimeoutError

    left_out = ""
    try:
        robustness.check_autoattack(settings, test.num_classes)
    except UsageError as error:
        say(str(error))
        left_out, settings = error.what, dataclasses.replace(settings, autoattack=())
    try:
        result = robustness.attack(classifier, test, settings, records, identity=identity, progress=progress)
    except TimeoutError:
        return {"left_out": "the time budget was spent"}
    return {**asdict(result), "eps": settings.eps, "left_out": left_out}


def _save(folder: Path, module: nn.Module, dtype: str) -> dict[str, Any]:
    stored = copy.deepcopy(module)
    # Counters stay whole numbers: Module.half() changes floating tensors only.
    return {**files.save_model(folder, stored.half() if dtype == "float16" else stored), "dtype": dtype}


def _resume(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    beside = path.with_suffix(".json")
    if beside.exists() and json.loads(beside.read_text(encoding="utf-8")) != header:
        raise UsageError(
            f"{path} belongs to other weights or parameters.",
            cause="The model was trained again, or [evaluation] was changed.",
            fix=f"Delete {path} and {beside.name}.",
        )
    write_whole(beside, (json.dumps(header, indent=2) + "\n").encode())
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    write_whole(path, "".join(whole).encode())
    return [json.loads(line) for line in whole]
