"""Run a certifier over a data set into a run directory: resumable, and shared among shards."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsplugins.certificate import Guarantee
from rsplugins.certifier import Certifier
from rsplugins.errors import ParameterError, RunError, UnreadableInputError
from rsplugins.host import Entry
from rsplugins.machine.progress import Progress, Silent
from rsplugins.provenance import processor, version, versions
from rsplugins.runs.manifest import Manifest, Selection, write_manifest
from rsplugins.runs.merge import finish
from rsplugins.runs.record import Record, RecordFile, Writer, read_files, shard_name, united
from rsplugins.runs.run import Run, open_run, refuse_edited
from rsplugins.runs.seals import forget_derived, run_seal, seal_record
from rsplugins.stopping import keeping

if TYPE_CHECKING:
    from torch import Tensor

    from rsplugins.classifier import Classifier
    from rsplugins.data import Dataset

Shard = tuple[int, int]


def parse_shard(text: str) -> Shard:
    """Read ``i/n``: shard i of n, counted from 0.

    Raises:
        ParameterError: not of that form, or i is not in 0 .. n-1.

    Example:
        >>> parse_shard("0/4")
        (0, 4)
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ParameterError(
            f"The shard is {text!r}; allowed: i/n with i from 0 to n-1.",
            cause="shards are counted from 0, so the last of four is 3/4",
            fix="use 0/4, 1/4, 2/4, 3/4 on four machines",
        )
    return int(first), int(second)


def build_manifest(
    entry: Entry,
    certifier: Certifier[Any],
    dataset: Dataset,
    indices: Sequence[int],
    *,
    model: str = "",
    data: str = "",
    command: Sequence[str] = (),
) -> Manifest:
    """Describe a run before it starts.

    Args:
        entry: the certifier's plugin.
        certifier: prepared.
        dataset: where the inputs come from.
        indices: which inputs, in order.
        model: the model's reference as the user gave it.
        data: the data set's reference as the user gave it.
        command: the command line.
    """
    from rsplugins.certification import described_function

    classifier, execution = certifier.classifier, certifier.execution
    described, origin = classifier.describe(), dataset.describe()
    return Manifest(
        method=entry.name,
        parameters=certifier.parameters.model_dump(mode="json"),
        seed=execution.seed,
        dtype=execution.dtype,
        compile=execution.compile,
        sound=execution.sound,
        model={"reference": model or described["source"], **described},
        data={"reference": data or origin["name"], **origin},
        selection=Selection.of(indices),
        function=described_function(certifier),
        execution={"batch_size": execution.batch_size, "channels_last": execution.channels_last, **_device(classifier)},
        versions=versions(),
        plugin={"distribution": entry.distribution, "version": entry.version},
        command=list(command),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _device(classifier: Classifier) -> dict[str, Any]:
    import torch

    from rsplugins.machine.device import device_name

    device = classifier.device
    name = processor() if device.type == "cpu" else device_name(device)
    return {"device": str(device), "device_name": name, "threads": torch.get_num_threads()}


def execute(
    entry: Entry,
    certifier: Certifier[Any],
    dataset: Dataset,
    indices: Sequence[int],
    directory: Path,
    *,
    shard: Shard | None = None,
    progress: Progress | None = None,
    model: str = "",
    data: str = "",
    command: Sequence[str] = (),
    conclude: bool = True,
) -> Run:
    """Certify the selected inputs that have no record yet, append a record for each, and write what follows from them.

    Args:
        entry: the certifier's plugin, from ``get_host().find("certifier", name)``.
        certifier: from :func:`rsplugins.certification.prepare`.
        dataset: where the inputs come from.
        indices: which inputs, in order.
        directory: the run directory; made when it does not exist, resumed when it holds this run.
        shard: (i, n) takes the groups of inputs (of one, for most certifiers) at positions i, i + n, i + 2n, ...; whichever shard
            ends last merges.
        progress: where to show progress.
        model: the model's reference, for the manifest.
        data: the data set's reference, for the manifest.
        command: the command line, for the manifest.
        conclude: whether to merge and to write results once all inputs are there; ranks that agree at the end leave it to one.

    Returns:
        The run as it now is; ``missing`` names inputs that other shards still owe.

    Raises:
        UsageError: the directory holds a run with other parameters; the text lists each as ``key: old -> new``.
        RunError: another process writes the same records.
    """
    dataset.check_classes(certifier.classifier.num_classes)
    manifest = build_manifest(entry, certifier, dataset, indices, model=model, data=data, command=command)
    seal = _sealer(directory, write_manifest(directory, manifest))
    files = read_files(directory)
    refuse_edited(directory, files)
    own = share(indices, shard, certifier.group)
    path = directory / shard_name(shard)
    if path.exists() or _owed(files, own):  # the writer also repairs a torn line after the last record that is owed
        with Writer(path, seal) as writer:
            todo = _owed(read_files(directory), own)  # once more: another process may have written until now
            if todo:
                forget_derived(directory)
            shown, title = progress or Silent(), _title(entry, shard)
            _say_resumed(shown, title, own, todo)
            task = shown.task(title, len(own), len(own) - len(todo))
            with keeping(lambda: _kept(title, directory, own)):
                _certify(entry, certifier, dataset, _work(indices, todo, certifier.group), writer, task)
    return finish(directory) if conclude else open_run(directory)


def _sealer(directory: Path, there: Manifest) -> Callable[[Record], Record]:
    """Return what seals a record of the run whose manifest lies in a directory, and names the version where it is another."""
    run, own = run_seal(directory), version()
    by = "" if not run or there.versions.get("rsplugins") == own else own
    return lambda record: seal_record(replace(record, by=by), run)


def share(indices: Sequence[int], shard: Shard | None, group: int = 1) -> list[int]:
    """Return a shard's inputs: every n-th group of them.

    Example:
        >>> share(range(8), (1, 2), 3)
        [3, 4, 5]
    """
    if shard is None:
        return list(indices)
    return [index for position, index in enumerate(indices) if position // group % shard[1] == shard[0]]


def _work(indices: Sequence[int], todo: Sequence[int], group: int) -> list[tuple[int, int, bool]]:
    """Return position, index and whether a record is owed, of each input whose group has one that is owed one."""
    owed = set(todo)
    touched = {position // group for position, index in enumerate(indices) if index in owed}
    return [(position, index, index in owed) for position, index in enumerate(indices) if position // group in touched]


def _owed(files: Mapping[Path, RecordFile], own: Sequence[int]) -> list[int]:
    known = united(files, say_torn=False)
    return [index for index in own if index not in known]


def _say_resumed(shown: Progress, title: str, own: Sequence[int], todo: Sequence[int]) -> None:
    if not todo:
        shown.say(f"{title}: all {len(own)} inputs are there; nothing is left to certify")
    elif len(todo) < len(own):
        shown.say(f"{title}: resuming with input {todo[0]}: {len(own) - len(todo)} of {len(own)} inputs are there")


def _kept(title: str, directory: Path, own: Sequence[int]) -> str:
    todo = _owed(read_files(directory), own)
    begins = f", with input {todo[0]}" if todo else ""
    return f"{title}: {len(own) - len(todo)} of {len(own)} inputs are kept in {directory}; the same command goes on there{begins}"


def _title(entry: Entry, shard: Shard | None) -> str:
    return entry.name if shard is None else f"{entry.name} {shard[0]}/{shard[1]}"


def _read(dataset: Dataset, index: int) -> tuple[Tensor, int]:
    try:
        return dataset[index]
    except (OSError, ValueError, LookupError) as error:  # not the certifier's fault, which runs around this
        raise RunError(
            f"Input {index} of {dataset.name} cannot be read: {type(error).__name__}: {error}",
            cause="the file is damaged or gone",
            fix="restore it, then run the same command again: it goes on where it stopped",
        ) from error


def _clean(classifier: Classifier, image: Tensor) -> int | None:
    """Return the model's prediction without noise; None where it takes windows of the image only."""
    import torch

    if classifier.input_size != tuple(image.shape):
        return None
    with torch.no_grad():
        logits = classifier(image[None].to(classifier.device))
    return int(logits.argmax(1)) if bool(logits.isfinite().all()) else None


def _certify(
    entry: Entry, certifier: Certifier[Any], dataset: Dataset, work: Sequence[tuple[int, int, bool]], writer: Writer, task: Any
) -> None:
    """Certify inputs and write the records that are owed.

    Args:
        entry: the certifier's plugin.
        certifier: prepared.
        dataset: where the inputs come from.
        work: from :func:`_work`.
        writer: of the records.
        task: of the progress.
    """
    from rsplugins.certification import batched, check_inputs, is_labelled, run_certifier

    labels: dict[int, int] = {}
    clean: dict[int, int | None] = {}
    asks, predicts = is_labelled(entry), _predicts(entry)
    spare = None if predicts else certifier.classifier.trial_copy()  # the certifier is to see the model as it was given
    owed = {index for _, index, is_owed in work if is_owed}
    answered = 0

    def append(record: Record) -> None:
        nonlocal answered
        if record.index in owed:  # others are there, and their group was only run to make it whole
            writer.append(record)
            answered += 1
            advance()

    def images() -> Iterator[tuple[int, Tensor]]:
        for position, index, _ in work:
            try:
                image, labels[index] = _read(dataset, index)
            except UnreadableInputError as error:
                # One damaged file costs one record, not the night.
                append(Record(index, int(dataset.labels[index]), {}, 0, 0.0, " ".join(str(error).split())))
                continue
            check_inputs(certifier, image[None])
            clean[index] = None if spare is None else _clean(spare, image)
            yield batched(certifier, index, image, position, labels[index] if asks else None)

    with task as advance:
        for gathered in run_certifier(entry, certifier, images()):
            label, seen = labels.pop(gathered.index), clean.pop(gathered.index)
            index, evidence, error = gathered.index, gathered.evidence, gathered.error
            append(Record(index, label, evidence, gathered.samples, gathered.seconds, error, seen))
    if answered != len(owed):
        raise RunError(f"The {entry.label} returned {answered} results for {len(owed)} inputs.", fix="Report it to its authors.")


def _predicts(entry: Entry) -> bool:
    """Whether a method's own prediction is the model's without noise, and need not be made twice."""
    return getattr(entry.descriptor, "guarantee", None) in (Guarantee.EMPIRICAL, Guarantee.NONE)
