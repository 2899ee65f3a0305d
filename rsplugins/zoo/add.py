"""Put a trained model, and the evidence about it, into a zoo."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rsplugins.errors import CheckpointError, DataNotFoundError, RunError, UsageError
from rsplugins.machine.files import write_whole
from rsplugins.models import manifest as manifests
from rsplugins.models.files import sha256
from rsplugins.runs.manifest import Manifest as RunManifest
from rsplugins.runs.manifest import Selection, read_manifest
from rsplugins.runs.record import RECORDS, Record, read_records, to_lines
from rsplugins.runs.run import refuse_edited
from rsplugins.runs.seals import SEAL, manifest_text, seal_record
from rsplugins.zoo import evidence
from rsplugins.zoo.sources import METHOD, WITHOUT, terms_of, title_of
from rsplugins.zoo.swap import rebuilt

LIMIT, HEADER = 16_000_000, 500_000
"""Bytes of one weights file, and those kept free for its list of tensors."""
RECIPE = "recipe.toml"


def add_trained(
    trained: Path,
    zoo: Path,
    *,
    summary: str = "",
    data_root: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Make the folder of a model that ``rsplugins train`` or ``zoo/train_all.py`` left behind.

    Weights go to float16 where that costs no accuracy on the test split. What is measured is what is stored: predictions
    on the test split are made here, and records that were packed with the model are taken over.

    Args:
        trained: with ``training.json``, ``recipe.toml`` and ``model.safetensors``.
        zoo: the folder of models.
        summary: one sentence; by default the title of ``recipes/ID.toml`` in the zoo.
        data_root: where data sets lie; without the test split there is no accuracy.
        say: told what was packed and is left out, and why.

    Returns:
        The model's folder.

    Raises:
        UsageError: not such a directory, or training has not ended.
        CheckpointError: the records are about other weights.
    """
    from rsplugins.training import files
    from rsplugins.training.recipe import load_recipe

    if not (trained / files.RECORD).is_file():
        raise UsageError(f"{trained} holds no trained model: it has no {files.RECORD}.", fix="Give what `rsplugins train` wrote.")
    record = evidence.read_json(trained / files.RECORD)
    if record["status"] != "finished":
        raise UsageError(f"{trained} is not trained to the end: {record['epochs']} of {record['epochs_planned']} epochs.")
    recipe = load_recipe(trained / RECIPE)
    classifier, table = _classifier(trained, record), _test_table(recipe, data_root)
    with rebuilt(zoo / recipe.name) as folder:
        title = summary or title_of(zoo / "recipes" / f"{recipe.name}.toml")
        _fill(folder, trained, record, recipe, classifier, table, title)
        for left_out in _take_packed(trained, folder, recipe):
            say(left_out)
        update(folder)
    return zoo / recipe.name


def _fill(folder: Path, trained: Path, record: Mapping[str, Any], recipe: Any, classifier: Any, table: Any, summary: str) -> None:
    """Write recipe, weights, manifest and predictions of a trained model."""
    shutil.copyfile(trained / RECIPE, folder / RECIPE)
    dtype = record["weights"].get("dtype")
    if dtype is None:
        classifier, dtype = _half(classifier, table)
    weights = _save(folder, classifier.module, "float16" if dtype == "float16" else "float32")
    manifest = manifests.Manifest(
        id=recipe.name,
        summary=summary,
        source="trained by `rsplugins train` for this zoo",
        paper=METHOD.get(recipe.hooks[0]["name"], "") if recipe.hooks else "",
        function_sha256=classifier.fingerprint(),
        licences=_licences(recipe.data.name),
        input=manifests.InputSpec(**record["input"]),
        architecture=manifests.Architecture(**record["architecture"]),
        recipe=manifests.RecipeFile(sha256=sha256(folder / RECIPE), data=recipe.data.name),
        weights=weights,
        training=manifests.Training(
            **{key: record[key] for key in ("seed", "device", "minutes", "epochs")},
            arithmetic=record.get("precision", ""),
            processor=record.get("processor", ""),
            versions=_versions(record["versions"], record["device"]),
            notes=record.get("notes", ""),
        ),
    )
    write(folder, manifest)
    if table is not None:
        _predict(folder, classifier, table, recipe)


def add_evidence(folder: Path, source: Path, name: str = "") -> Path:
    """Take over a run of ``rsplugins certify``, or a directory of ``rsplugins attack``, as evidence about a model.

    Args:
        folder: of the model.
        source: the run or attack directory.
        name: of the evidence; by default ``attack`` or the method, and for a second run with other parameters ``METHOD-nN``.

    Raises:
        CheckpointError: it is about other weights.
        RunError: the run is not complete, or was edited.
    """
    with rebuilt(folder) as copy:
        _take_evidence(copy, source, name)
        update(copy)
    return folder


def _take_evidence(folder: Path, source: Path, name: str) -> None:
    manifest = manifests.read(folder)
    if (source / evidence.ATTACK).is_file():
        head = evidence.read_json(source / evidence.ATTACK)
        head["settings"]["model"] = f"zoo:{manifest.id}"
        rows = (source / evidence.ATTACKED).read_text(encoding="utf-8")
        _store(folder, name or "attack", {evidence.ATTACK: _dump(head), evidence.ATTACKED: rows})
        return
    refuse_edited(source)
    run = read_manifest(source)
    data = {**run.data, "reference": _reference(run, manifest)}
    plain = run.model_copy(update={"command": [], "model": {**run.model, "reference": f"zoo:{manifest.id}"}, "data": data})
    records = read_records(source)
    if missing := [index for index in run.selection.indices() if index not in records]:
        raise RunError(f"{source} is not complete: {len(missing)} inputs have no record.", fix="Run its command again.")
    _store(folder, name or _name(folder, run), _sealed(plain, (records[index] for index in run.selection.indices())))


def _name(folder: Path, run: RunManifest) -> str:
    """Return where a run belongs: in the place of the run of its method with its parameters, or in one of its own."""
    n = run.parameters.get("n")
    several = (f"{run.method}-{number}" for number in itertools.count(2))
    for name in itertools.chain([run.method], [f"{run.method}-n{n}"] if n else [], several):
        place = folder / "records" / name
        if not (place / evidence.RUN).is_file() or read_manifest(place).parameters == run.parameters:
            return name
    raise AssertionError  # there is no last number


def _sealed(run: RunManifest, records: Iterable[Record]) -> dict[str, str]:
    """Return the two files of a run with seals that fit them."""
    text = manifest_text(run, indent=1)
    seal = json.loads(text).get(SEAL, "")
    return {evidence.RUN: text, RECORDS: "".join(to_lines(seal_record(record, seal) for record in records))}


def _reference(run: RunManifest, manifest: manifests.Manifest) -> str:
    """Return how the run's data are named: as in the recipe where they are the recipe's, whose place differs by machine."""
    own, name, reference = manifest.recipe.data, str(run.data.get("name", "")), str(run.data["reference"])
    kind, _, folder = own.partition(":")
    if name.partition(":")[0] != kind:
        return reference
    if kind != "folder":
        return own
    parts = Path(reference.removeprefix("folder:")).parts
    # A split may be a folder inside: folder:cifar10/test.
    return f"folder:{'/'.join(parts[parts.index(folder) :])}" if folder in parts else reference


def add_recipe(recipe_file: Path, zoo: Path) -> Path:
    """Make the folder of a model without weights, whose data cannot be shipped: manifest and recipe.

    Raises:
        UsageError: no reason is known for its data set.
    """
    from rsplugins.training.recipe import load_recipe, to_toml

    recipe = load_recipe(recipe_file)
    data = recipe.data.name.partition(":")[0]
    if data not in WITHOUT or recipe.data.input_size is None:
        raise UsageError(f"{recipe.data.name} is no data set that the zoo goes without.", fix=f"One of: {', '.join(WITHOUT)}.")
    classes, reason = WITHOUT[data]
    model = recipe.model
    with rebuilt(zoo / recipe.name) as folder:
        write_whole(folder / RECIPE, to_toml(recipe))
        write(
            folder,
            manifests.Manifest(
                id=recipe.name,
                summary=title_of(recipe_file),
                source="not trained yet",
                paper=METHOD.get(recipe.hooks[0]["name"], ""),
                no_weights=reason,
                licences=_licences(recipe.data.name),
                input=manifests.InputSpec(shape=recipe.data.input_size, mean=model.mean, std=model.std),
                architecture=manifests.Architecture(name=model.architecture, num_classes=classes, arguments=model.arguments),
                recipe=manifests.RecipeFile(sha256=sha256(folder / RECIPE), data=recipe.data.name),
            ),
        )
    return zoo / recipe.name


def update(folder: Path) -> Path:
    """Write into a model's manifest every number that follows from its evidence, and no other."""
    manifest = manifests.read(folder)
    for name in evidence.names(folder):
        about = evidence.function_sha256(folder, name)
        if about != manifest.function_sha256:
            raise CheckpointError(
                f"{folder / 'records' / name} is about other weights than {manifest.id}.",
                cause="The model was trained again, or the evidence was gathered before its weights were rounded.",
                fix=f"Remove that folder, and gather the evidence with --model zoo:{manifest.id}.",
            )
    results = [result for name in evidence.names(folder) for result in evidence.measure(folder, name)]
    return write(folder, manifest.model_copy(update={"results": tuple(results)}))


def write(folder: Path, manifest: manifests.Manifest) -> Path:
    """Write a manifest; return the folder."""
    write_whole(folder / manifests.FILE, manifests.dumps(manifest))
    return folder


def _classifier(trained: Path, record: Mapping[str, Any]) -> Any:
    from rsplugins.classifier import Classifier
    from rsplugins.models import architectures, checkpoint

    about, spec = record["architecture"], record["input"]
    network = architectures.build(about["name"], num_classes=about["num_classes"], **about["arguments"])
    checkpoint.fit(network, checkpoint.read(trained / "model.safetensors"), str(trained))
    return Classifier(
        network, mean=spec["mean"], std=spec["std"], input_size=spec["shape"], num_classes=about["num_classes"]
    ).eval()


def _test_table(recipe: Any, data_root: Path | None) -> Any:
    from rsplugins.training.splits import open_table

    try:
        return open_table(recipe.data, recipe.data.test, data_root)
    except DataNotFoundError:
        return None


def _half(classifier: Any, table: Any) -> tuple[Any, str]:
    from rsplugins.training.packing import half_precision

    return (classifier, "float32") if table is None else half_precision(classifier, table)


def _save(folder: Path, module: Any, dtype: Literal["float16", "float32"]) -> tuple[manifests.Weights, ...]:
    """Store the weights in as many files as the limit asks for."""
    from safetensors.torch import save

    for old in folder.glob("model*.safetensors"):
        old.unlink()
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in module.state_dict().items():
        stored = tensor.detach().cpu().contiguous()
        # Counters stay whole numbers.
        stored = stored.half() if dtype == "float16" and stored.is_floating_point() else stored
        if size + stored.nbytes > LIMIT - HEADER and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
    written = []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        data = save(shard, metadata={"format": "pt"})
        write_whole(folder / name, data)
        written.append(manifests.Weights(file=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), dtype=dtype))
    return tuple(written)


def _licences(data: str) -> manifests.Licences:
    terms = terms_of(data)
    if terms is None:
        raise UsageError(f"The licence of the data set {data!r} is not known.", fix="Add it to DATA_LICENCES in zoo/sources.py.")
    return manifests.Licences(code="Apache-2.0", weights="Apache-2.0", data=terms)


def _versions(found: Mapping[str, str], device: str) -> dict[str, str]:
    """Leave out the CUDA that torch was built for where no GPU was used."""
    return {name: version for name, version in found.items() if name != "cuda" or device != "cpu"}


def _predict(folder: Path, classifier: Any, table: Any, recipe: Any) -> None:
    import torch

    from rsplugins.data.table import as_float
    from rsplugins.training import files

    predicted: list[int] = []
    with torch.no_grad():
        for images, _ in table.batches(torch.split(torch.arange(len(table)), 500)):
            predicted += classifier(as_float(images)).argmax(1).tolist()
    head = {
        "model": {"sha256": classifier.fingerprint()},
        "data": {"reference": recipe.data.name, "split": recipe.data.test},
        "device": "cpu",
        "versions": _versions(files.versions(), "cpu"),
        "labels": table.labels.tolist(),
        "predictions": predicted,
    }
    _store(folder, "accuracy", {evidence.PREDICTIONS: json.dumps(head, separators=(",", ":")) + "\n"})


def _take_packed(trained: Path, folder: Path, recipe: Any) -> Iterator[str]:
    """Take over the records that ``zoo/train_all.py`` packed beside the weights; yield what is left out: some of the inputs.

    The first inputs of a list are no sample of it, so a number over them alone would be about something else.
    """
    records, about = trained / "records", trained / "evaluation.json"
    if not about.is_file():
        return
    found = evidence.read_json(about)
    data = {"reference": recipe.data.name, "split": recipe.data.test}
    if (records / "gaussian.jsonl").is_file():
        head, text = evidence.read_json(records / "gaussian.json"), (records / "gaussian.jsonl").read_text(encoding="utf-8")
        indices = [json.loads(line)["index"] for line in text.splitlines()]
        planned = list(range(0, found["images"], head["stride"]))
        if indices == planned:
            run = RunManifest(
                method="gaussian",
                parameters=head["parameters"],
                seed=head["seed"],
                dtype=head["dtype"],
                model={"reference": f"zoo:{recipe.name}", "sha256": head["weights"]},
                data=data,
                selection=Selection.of(planned),
                execution={"device": "cpu" if found["device"] == "cpu" else "cuda", "device_name": found["device"]},
                versions=found["versions"],
                plugin={"distribution": "rsplugins", "version": found["versions"].get("rsplugins", "")},
            )
            _store(folder, "gaussian", _sealed(run, map(Record.from_json, text.splitlines())))
        else:
            yield (
                f"{recipe.name}: the packed certificates are of {len(indices)} of the {len(planned)} inputs and are left out; "
                f"go on with train_all.py, or use `rsplugins certify --model zoo:{recipe.name}`"
            )
    if (records / evidence.ATTACKED).is_file() and "result" in (head := evidence.read_json(records / evidence.ATTACK)):
        head["settings"] |= {"data": data["reference"], "split": data["split"], "model": f"zoo:{recipe.name}"}
        head.setdefault("ran", {"device": found["device"], "versions": found["versions"]})
        rows = (records / evidence.ATTACKED).read_text(encoding="utf-8")
        _store(folder, "attack", {evidence.ATTACK: _dump(head), evidence.ATTACKED: rows})


def _store(folder: Path, name: str, contents: Mapping[str, str]) -> None:
    place = folder / "records" / name
    # The folder is a copy that takes the place of the model's when all of it is written.
    if place.is_dir():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for file, text in contents.items():
        write_whole(place / file, text)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
