"""The layout of a model repository on Hugging Face: safetensors, config.json, and a README with a model-index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rsplugins.errors import UsageError
from rsplugins.machine.files import write_whole
from rsplugins.models import manifest as manifests
from rsplugins.models.manifest import Manifest, Result
from rsplugins.runs.tables import radius_text
from rsplugins.zoo import cards
from rsplugins.zoo.verify import verify

CONFIG = "config.json"
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
_DATASETS = {"digits": "sklearn-digits", "mnist": "ylecun/mnist", "cifar10-jpeg": "cifar10-jpeg"}


def publish(folder: Path, out: Path) -> Path:
    """Write one model in that layout.

    Args:
        folder: of the model, whose numbers are checked first.
        out: the folder to write; it must be empty or not there.

    Raises:
        UsageError: the model has no weights, its numbers do not follow from its records, or ``out`` holds something.
    """
    manifest = manifests.read(folder)
    if manifest.recipe is None:
        raise UsageError(f"{manifest.id} is not published: its weights are others', in a package of theirs.")
    if not manifest.weights:
        raise UsageError(f"{manifest.id} has no weights to publish: {manifest.no_weights}")
    problems = verify(folder, quick=True).problems
    if problems:
        raise UsageError(
            f"{manifest.id} is not published: {problems[0]}", fix=f"rsplugins zoo verify {manifest.id} lists all of it."
        )
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty.", fix="Give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name in (manifests.FILE, manifest.recipe.file, *(weights.file for weights in manifest.weights)):
        shutil.copyfile(folder / name, out / name)
    if (folder / "records").is_dir():
        shutil.copytree(folder / "records", out / "records")
    if (folder / cards.CURVE).is_file():
        shutil.copyfile(folder / cards.CURVE, out / cards.CURVE)
    _write_index(folder, manifest, out)
    write_whole(out / CONFIG, json.dumps(config(manifest), indent=2) + "\n")
    body = cards.card(manifest, curve=(out / cards.CURVE).is_file())
    write_whole(out / cards.CARD, f"---\n{front_matter(manifest)}---\n\n{body}")
    return out


def upload(out: Path, repository: str, token: str | None) -> str:
    """Upload a folder that :func:`publish` wrote; return its address.

    Raises:
        UsageError: there is no token.
    """
    if not token:
        raise UsageError(
            "Nothing is uploaded without a token.", fix="Set HF_TOKEN, or leave --repo out to write the folder only."
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(out))
    return str(address)


def config(manifest: Manifest) -> dict[str, Any]:
    """Return config.json: what builds the network, and what it expects."""
    return {
        "library_name": "rsplugins",
        "model_type": manifest.architecture.name,
        "num_labels": manifest.architecture.num_classes,
        "arguments": manifest.architecture.arguments,
        **{key: value for key, value in manifest.input.model_dump(mode="json").items() if value is not None},
        "rsplugins_id": manifest.id,
        "function_sha256": manifest.function_sha256,
    }


def front_matter(manifest: Manifest) -> str:
    """Return the README's metadata as YAML, which JSON is a part of: one key a line."""
    data = cards.data_of(manifest)
    licence = _LICENCES.get(manifest.licences.weights)
    metadata: dict[str, Any] = {
        "library_name": "rsplugins",
        "license": licence or "other",
        **({} if licence else {"license_name": manifest.licences.weights}),
        "pipeline_tag": "image-classification" if len(manifest.input.shape) == 3 else "video-classification",
        "tags": ["certified-robustness", "adversarial-robustness", "rsplugins"],
        "datasets": [_DATASETS.get(data, data)],
        "model-index": [{"name": manifest.id, "results": _index(manifest)}],
    }
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())


def _index(manifest: Manifest) -> list[dict[str, Any]]:
    """Group the results by data set and split, as model-index wants them."""
    task = "image-classification" if len(manifest.input.shape) == 3 else "video-classification"
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in manifest.results:
        groups.setdefault((result.data, result.split), []).append(result)
    name = cards.data_of(manifest)
    return [
        {
            "task": {"type": task},
            "dataset": {"name": name, "type": _DATASETS.get(name, name), "split": split},
            "metrics": [_metric(result) for result in results],
        }
        for (_, split), results in groups.items()
    ]


def _metric(result: Result) -> dict[str, Any]:
    kept = result.model_dump(mode="json", exclude={"metric", "value", "data", "split"}, exclude_defaults=True)
    return {"type": result.metric, "name": metric_name(result), "value": result.value, "args": kept}


def metric_name(result: Result) -> str:
    """Return a number's name with its guarantee, so that an estimate or an attack is not taken for a certificate.

    Samples and inputs are part of it: a model may have the same number from several runs.
    """
    radius = "" if result.radius is None else f" at {result.norm} {radius_text(result.radius, result.norm)}"
    said = [] if result.guarantee is None else [str(result.guarantee), result.certifier]
    said += [] if result.n is None else [f"n = {result.n:,}"]
    return f"{result.metric.replace('_', ' ')}{radius} ({', '.join([*said, f'{result.images:,} inputs'])})"


def _write_index(folder: Path, manifest: Manifest, out: Path) -> None:
    """Write the list of tensors that several weights files need."""
    from rsplugins.models.files import safetensors_header

    if len(manifest.weights) == 1:
        return
    places = {name: weights.file for weights in manifest.weights for name in safetensors_header(folder / weights.file)}
    total = sum(weights.bytes for weights in manifest.weights)
    write_whole(
        out / "model.safetensors.index.json", json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
    )
