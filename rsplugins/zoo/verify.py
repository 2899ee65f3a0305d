"""Check a model of the zoo: its files, every number from its records without torch, and a small sample with the model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsplugins.errors import CheckpointError, DataNotFoundError, PackageMissingError, PluginUnavailableError, RspluginsError
from rsplugins.models import manifest as manifests
from rsplugins.models.files import safetensors_header, sha256
from rsplugins.models.manifest import Manifest, Result
from rsplugins.runs.tables import radius_text
from rsplugins.zoo import evidence
from rsplugins.zoo.sources import terms_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHARD = 16_000_000
"""Bytes that a weights file stays below."""
CLOSE = 2e-6
"""Numbers are stored with six digits."""
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass
class Report:
    """What was found about one model.

    Attributes:
        id: the folder's name.
        problems: what differs; none when all is well.
        notes: what was left out, and why.
        numbers: how many results were recomputed.
        rerun: what was run again, in words.
    """

    id: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: int = 0
    rerun: list[str] = field(default_factory=list)


def verify(folder: Path, *, quick: bool = False, data_root: Path | None = None) -> Report:
    """Check one model.

    Args:
        folder: of the model.
        quick: leave out what needs the model: loading the weights, and running a small sample again.
        data_root: where data sets lie; a sample whose data are not there is left out, and that is noted.
    """
    report = Report(folder.name)
    try:
        manifest = manifests.read(folder)
    except CheckpointError as error:
        report.problems.append(error.what)
        return report
    report.problems += [*_names(folder, manifest), *_weights(folder, manifest), *_licences(manifest)]
    report.problems += _numbers(folder, manifest)
    report.numbers = len(manifest.results)
    if manifest.no_weights:
        report.notes.append(f"no weights: {manifest.no_weights}")
    elif not quick and not report.problems:
        _run_again(folder, manifest, data_root, report)
    return report


def _names(folder: Path, manifest: Manifest) -> Iterator[str]:
    if folder.name != manifest.id:
        yield f"the folder is named {folder.name}, the model {manifest.id}"
    if manifest.recipe is None:
        return
    recipe = folder / manifest.recipe.file
    if not recipe.is_file():
        yield f"{recipe.name} is missing"
        return
    if (found := sha256(recipe)) != manifest.recipe.sha256:
        yield f"{recipe.name} has sha256 {found[:12]}..., the manifest says {manifest.recipe.sha256[:12]}..."
    try:
        yield from _recipe(tomllib.loads(recipe.read_text(encoding="utf-8")), manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{recipe.name} cannot be read: {type(error).__name__}: {error}"


def _recipe(recipe: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """Yield what the manifest says and its recipe does not."""
    if recipe["name"] != manifest.id:
        yield f"recipe.toml is not the recipe of {manifest.id}"
    data, model, training = recipe["data"], recipe["model"], manifest.training
    arguments = manifests.stored(model.get("arguments", {}))
    said: list[tuple[str, Any, Any]] = [
        ("recipe.data", manifest.data, data["name"]),
        ("architecture.name", manifest.architecture.name, model["architecture"]),
        ("architecture.arguments", manifest.architecture.arguments, arguments),
        ("input.mean", manifest.input.mean, model.get("mean")),
        ("input.std", manifest.input.std, model.get("std")),
    ]
    if training is not None:
        said += [("training.seed", training.seed, recipe.get("seed", 0))]
        said += [("training.epochs", training.epochs, recipe["training"]["epochs"])]
    for name, value, wanted in said:
        if not _same(value, wanted):
            yield f"{name} is {value!r}, the recipe says {wanted!r}"


def _weights(folder: Path, manifest: Manifest) -> Iterator[str]:
    for weights in manifest.weights:
        path = folder / weights.file
        if not path.is_file():
            yield f"{weights.file} is missing"
            continue
        size, found = path.stat().st_size, sha256(path)
        if size != weights.bytes:
            yield f"{weights.file} has {size} bytes, the manifest says {weights.bytes}"
        if found != weights.sha256:
            yield f"{weights.file} has sha256 {found[:12]}..., the manifest says {weights.sha256[:12]}..."
        if size >= SHARD:
            yield f"{weights.file} has {size} bytes; a file stays below {SHARD}"
        try:
            stored = {entry["dtype"] for entry in safetensors_header(path).values()}
        except CheckpointError as error:
            yield error.what
            continue
        floats = {_DTYPES[dtype] for dtype in stored if dtype in _DTYPES}
        if floats != {weights.dtype}:
            yield f"{weights.file} holds {', '.join(sorted(floats)) or 'no floating-point tensors'}, not {weights.dtype}"


def _licences(manifest: Manifest) -> Iterator[str]:
    for name, text in manifest.licences:
        if re.fullmatch(r"\s*|unknown|todo|tbd|\?+", text, re.IGNORECASE):
            yield f"licences.{name} is {text!r}"
    terms = terms_of(manifest.data)
    if terms is not None and manifest.licences.data != terms:
        yield f"licences.data is {manifest.licences.data!r}; what is known of {manifest.data}: {terms!r}"


def _numbers(folder: Path, manifest: Manifest) -> Iterator[str]:
    recomputed: dict[tuple[Any, ...], Result] = {}
    for name in evidence.names(folder):
        try:
            if (about := evidence.function_sha256(folder, name)) != manifest.function_sha256:
                yield f"records/{name} is about other weights ({about[:12] or 'unnamed'}) than the manifest's"
            recomputed.update((_key(result), result) for result in evidence.measure(folder, name))
        except RspluginsError as error:
            yield f"records/{name}: {error.what}"
    for result in manifest.results:
        found = recomputed.pop(_key(result), None)
        if found is None:
            yield f"{title(result)}: no such number follows from records/{result.records}"
        else:
            yield from _differences(result, found)
    for result in recomputed.values():
        yield f"{title(result)} follows from the records and is not in the manifest"


def _key(result: Result) -> tuple[Any, ...]:
    return result.records, result.metric, result.certifier, result.radius


def title(result: Result) -> str:
    """Return what a number is, in words."""
    radius = "" if result.radius is None else f" at {radius_text(result.radius, result.norm)}"
    by = f" by {result.certifier}" if result.certifier else ""
    return f"{result.metric}{radius}{by}"


def _differences(written: Result, found: Result) -> Iterator[str]:
    there, here = written.model_dump(), found.model_dump()
    for name, value in here.items():
        # Manifests of earlier releases do not say which inputs a run took.
        if not _same(there[name], value) and not (name == "stride" and there[name] is None and written.certifier):
            yield f"{title(written)}: {name} is {there[name]}, recomputed {value}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, (float, int)):
        return abs(a - b) <= CLOSE
    return bool(a == b)


def _run_again(folder: Path, manifest: Manifest, data_root: Path | None, report: Report) -> None:
    from rsplugins.models.zoo import load_folder
    from rsplugins.zoo import sample

    try:
        classifier = load_folder(folder)
        if classifier.fingerprint() != manifest.function_sha256:
            report.problems.append("the loaded model is not the function that function_sha256 names")
            return
    except PackageMissingError as error:  # its own, or that of the model behind its denoiser
        report.notes.append(f"not run: {error.what}")
        return
    except RspluginsError as error:
        report.problems.append(error.what)
        return
    loaded: dict[tuple[str, str], Any] = {}
    for name in evidence.names(folder):
        try:
            count, problems = sample.check(folder, name, classifier, data_root, loaded)
        except (DataNotFoundError, PluginUnavailableError) as error:
            report.notes.append(f"records/{name} was not run again: {error.what}")
            continue
        except RspluginsError as error:
            report.problems.append(f"records/{name} cannot be run again: {error.what}")
            continue
        report.problems += [f"records/{name}: {problem}" for problem in problems]
        report.rerun.append(f"{name} on {count} inputs")
