"""Put a trained model, and the evidence about it, into a zoo."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rsplugins.errors import CheckpointError, DataNotFoundError, RunError, UsageError
from rsplugins.machine.files import write_whole
from rsplugins.models import manifest as manifests
from rsplugins.models.files import sha256
from rsplugins.runs.manifest import Manifest as RunManifest
from rsplugins.runs.manifest import read_manifest
from rsplugins.runs.record import RECORDS, Record, read_records, to_lines
from rsplugins.runs.run import refuse_edited
from rsplugins.runs.seals import MANIFEST, SEAL, manifest_text, seal_record
from rsplugins.zoo import evidence, weights
from rsplugins.zoo.sources import METHOD, WITHOUT, terms_of, title_of
from rsplugins.zoo.swap import rebuilt

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

    Weights go to float16 where that costs no accuracy on the test split. The complete runs that ``zoo/train_all.py`` left in
    ``runs/`` beside them are taken over as evidence; others come by :func:`add_evidence`.

    Args:
        trained: with ``training.json``, ``recipe.toml`` and ``model.safetensors``.
        zoo: the folder of models.
        summary: one sentence; by default the title of ``recipes/ID.toml`` in the zoo.
        data_root: where data sets lie; without the test split the weights stay as they are.
        say: told which run is left out, and why.

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
        for run in sorted(path.parent for path in trained.glob(f"runs/*/{MANIFEST}")):
            try:
                _take_evidence(folder, run, "")
            except RunError as error:
                say(f"{recipe.name}: the run {run.name} is left out: {error.what}")
        update(folder)
    return zoo / recipe.name


def _fill(folder: Path, trained: Path, record: Mapping[str, Any], recipe: Any, classifier: Any, table: Any, summary: str) -> None:
    """Write recipe, weights and manifest of a trained model."""
    shutil.copyfile(trained / RECIPE, folder / RECIPE)
    dtype = record["weights"].get("dtype")
    if dtype is None:
        classifier, dtype = (classifier, "float32") if table is None else weights.half_precision(classifier, table)
    files = weights.save(folder, classifier.module, "float16" if dtype == "float16" else "float32")
    manifest = manifests.Manifest(
        id=recipe.name,
        summary=summary,
        source="trained by `rsplugins train` for this zoo",
        paper=METHOD.get(recipe.hooks[0]["name"], "") if recipe.hooks else "",
        function_sha256=classifier.fingerprint(),
        licences=_licences(recipe.data.name),
        input=manifests.InputSpec(**{**record["input"], "shape": classifier.input_size}),
        architecture=manifests.Architecture(**record["architecture"]),
        recipe=manifests.RecipeFile(sha256=sha256(folder / RECIPE), data=recipe.data.name),
        weights=files,
        training=manifests.Training(
            **{key: record[key] for key in ("seed", "device", "minutes", "epochs")},
            arithmetic=record.get("precision", ""),
            processor=record.get("processor", ""),
            versions=_versions(record["versions"], record["device"]),
            notes=record.get("notes", ""),
        ),
    )
    write(folder, manifest)


def add_evidence(folder: Path, source: Path, name: str = "") -> Path:
    """Take over a run, of whatever method, as evidence about a model.

    Args:
        folder: of the model.
        source: the run's directory.
        name: of the evidence; by default the method, and for a second run with other parameters ``METHOD-nN``.

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
        if not (place / MANIFEST).is_file() or read_manifest(place).parameters == run.parameters:
            return name
    raise AssertionError  # there is no last number


def _sealed(run: RunManifest, records: Iterable[Record]) -> dict[str, str]:
    """Return the two files of a run with seals that fit them."""
    text = manifest_text(run, indent=1)
    seal = json.loads(text).get(SEAL, "")
    return {MANIFEST: text, RECORDS: "".join(to_lines(seal_record(record, seal) for record in records))}


def _reference(run: RunManifest, manifest: manifests.Manifest) -> str:
    """Return how the run's data are named: as in the recipe where they are the recipe's, whose place differs by machine."""
    own, name, reference = manifest.data, str(run.data.get("name", "")), str(run.data["reference"])
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
    from rsplugins.models import checkpoint
    from rsplugins.models.zoo import network as build

    about, spec = record["architecture"], record["input"]
    network = build(about["name"], num_classes=about["num_classes"], **about["arguments"])
    checkpoint.fit(network, checkpoint.read(trained / "model.safetensors"), str(trained))
    # A denoiser is trained on windows; the whole takes what the classifier behind it takes.
    size = getattr(getattr(network, "classifier", None), "input_size", None) or spec["shape"]
    return Classifier(network, mean=spec["mean"], std=spec["std"], input_size=size, num_classes=about["num_classes"]).eval()


def _test_table(recipe: Any, data_root: Path | None) -> Any:
    from rsplugins.training.splits import open_table

    try:
        return open_table(recipe.data, recipe.data.test, data_root)
    except DataNotFoundError:
        return None


def _licences(data: str) -> manifests.Licences:
    terms = terms_of(data)
    if terms is None:
        raise UsageError(f"The licence of the data set {data!r} is not known.", fix="Add it to DATA_LICENCES in zoo/sources.py.")
    return manifests.Licences(code="Apache-2.0", weights="Apache-2.0", data=terms)


def _versions(found: Mapping[str, str], device: str) -> dict[str, str]:
    """Leave out the CUDA that torch was built for where no GPU was used."""
    return {name: version for name, version in found.items() if name != "cuda" or device != "cpu"}


def _store(folder: Path, name: str, contents: Mapping[str, str]) -> None:
    place = folder / "records" / name
    # The folder is a copy that takes the place of the model's when all of it is written.
    if place.is_dir():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for file, text in contents.items():
        write_whole(place / file, text)
