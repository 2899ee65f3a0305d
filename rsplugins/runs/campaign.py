"""Several certifiers over one model and one data set: each on its own, one that fails does not stop the others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsplugins.certification import certifier_class, check_execution, prepare
from rsplugins.certifier import Certifier, Execution
from rsplugins.errors import ParameterError, RspluginsError, UnknownNameError, UsageError, did_you_mean
from rsplugins.host import CertifierDescriptor, Entry, Status, get_host
from rsplugins.machine.files import write_whole
from rsplugins.machine.progress import Progress, shown_on, step
from rsplugins.machine.ranks import Ranks
from rsplugins.parameters import where
from rsplugins.runs.derived import REPORT
from rsplugins.runs.execute import Shard, execute
from rsplugins.runs.merge import finish
from rsplugins.runs.run import Run, open_run

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier
    from rsplugins.data import Dataset

DEFAULT_INPUTS, DEFAULT_N = 100, 5_000
"""What the command without arguments certifies, and the samples an input it spends: about a minute on two cores."""


@dataclass(frozen=True)
class Request:
    """What ``rsplugins certify`` was asked for.

    Attributes:
        model: a model reference; None for the embedded default.
        data: a data reference; None for the embedded default.
        methods: certifiers by name; empty for all that are available.
        settings: ``key`` or ``method.key`` to value.
        stop_at: radii to decide, for the methods that can.
        out: the directory; None for a name made of the request, so that the same request finds its run again.
        start: first index.
        stop: first index left out.
        stride: every how many.
        images: how many inputs, spread over the split where ``stride`` does not say otherwise; None for all of them.
        data_root: where data sets lie.
        split: of the data set.
        model_options: for the model source.
        denoiser: a denoiser's reference, put in front of the model, for the noise that ``sigma`` in the settings says.
        data_options: for the data set.
        device: such as ``"cuda"``; None chooses.
        execution: how to run the model.
        shard: this process's share.
        command: the command line, for the manifest.
    """

    model: str | None = None
    data: str | None = None
    methods: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    stop_at: tuple[float, ...] = ()
    out: Path | None = None
    start: int = 0
    stop: int | None = None
    stride: int | None = None
    images: int | None = None
    data_root: Path | None = None
    split: str = "test"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    denoiser: str | None = None
    device: str | None = None
    execution: Execution = field(default_factory=Execution)
    shard: Shard | None = None
    command: tuple[str, ...] = ()

    @property
    def is_default(self) -> bool:
        """Whether the embedded model is certified on the embedded data."""
        return self.model is None and self.data is None


@dataclass(frozen=True)
class Outcome:
    """What became of one method: a run, or the error that ended it.

    Attributes:
        name: the method.
        run: its run, when it went well.
        error: why it did not.
        skipped: nobody asked for it by name, and it is not installed in full or does not fit the model: no failure.
    """

    name: str
    run: Run | None = None
    error: RspluginsError | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Campaign:
    """The outcomes of a request.

    Attributes:
        directory: where they lie.
        outcomes: one a method.
        report: the page that compares them; None when nothing could be reported yet.
        leads: whether this process speaks for all ranks.
    """

    directory: Path
    outcomes: tuple[Outcome, ...]
    report: Path | None
    leads: bool = True

    @property
    def runs(self) -> list[Run]:
        """The runs of the methods that did not fail."""
        return [outcome.run for outcome in self.outcomes if outcome.run is not None]

    @property
    def failed(self) -> bool:
        """Whether a method failed, or an input of one."""
        return any(outcome.error and not outcome.skipped for outcome in self.outcomes) or any(
            row.failed for run in self.runs for row in run.rows
        )


def carry_out(request: Request, progress: Progress) -> Campaign:
    """Certify with every method asked for.

    Raises:
        UsageError: the request as a whole cannot be carried out: unknown names, settings that no method has, data not found.
        RspluginsError: the model cannot be loaded.
    """
    check_execution(request.execution)
    ranks = Ranks.from_environment()
    if ranks.world > 1 and request.shard is not None:
        raise UsageError("--shard does not go with torchrun, which shards by itself.", fix="leave --shard out")
    entries, outcomes = choose(request.methods)
    settings, broken = assign_settings(entries, _with_defaults(request))
    outcomes += broken
    directory = request.out or default_directory(request)
    with shown_on(progress):
        classifier, dataset, names = _load(request)
    indices = _select(request, dataset)
    job = _Job(replace(request, shard=request.shard or ranks.shard), classifier, dataset, indices, names, progress)
    for entry in [entry for entry in entries if entry.name in settings]:
        place = directory if len(request.methods) == 1 else directory / entry.name
        with shown_on(progress, entry.name):
            outcomes.append(_attempt(job, entry, settings[entry.name], place, conclude=ranks.world == 1))
    outcomes = _agree(ranks, outcomes)
    if not any(outcome.run for outcome in outcomes) and all(outcome.skipped for outcome in outcomes):
        raise next(outcome.error for outcome in outcomes if outcome.error)
    report = _report(directory, outcomes, single=len(request.methods) == 1) if ranks.rank == 0 else None
    ranks.leave()
    return Campaign(directory, tuple(outcomes), report, leads=ranks.rank == 0)


def carry_out_one(
    entry: Entry,
    certifier: Certifier[Any],
    dataset: Dataset,
    indices: Sequence[int],
    directory: Path,
    *,
    data: str,
    progress: Progress,
) -> Run:
    """Run a certifier that is ready over a data set, shared among the ranks that torchrun started.

    Raises:
        RspluginsError: it failed, on this rank or another.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        return execute(entry, certifier, dataset, indices, directory, progress=progress, data=data)
    error: RspluginsError | None = None
    try:
        execute(entry, certifier, dataset, indices, directory, shard=ranks.shard, progress=progress, data=data, conclude=False)
    except RspluginsError as failed:
        error = failed
    told = [each for each in ranks.agree(error) if each is not None]
    run = finish(directory) if ranks.rank == 0 and not told else None
    ranks.agree(None)
    if told:
        raise told[0]
    return open_run(directory) if run is None else run


def choose(methods: Sequence[str]) -> tuple[list[Entry], list[Outcome]]:
    """Return the certifiers to run, and outcomes for those that cannot.

    Raises:
        UnknownNameError: a method that nobody registered.
        PluginUnavailableError, PluginError: the only method that was asked for cannot be used.
        UsageError: a method was named twice, or no certifier is available.
    """
    host = get_host()
    if methods:
        if len(set(methods)) < len(methods):
            raise UsageError("A method was named twice.", fix="name each once; give runs with other parameters another --out")
        entries = [host.find("certifier", name) for name in methods]
        if len(entries) == 1 and entries[0].status is not Status.ACTIVE:
            raise entries[0].error()
    else:
        entries = [
            entry
            for entry in host.entries("certifier")
            if isinstance(entry.descriptor, CertifierDescriptor) and entry.descriptor.default
        ]
    active = [entry for entry in entries if entry.status is Status.ACTIVE]
    others = [
        Outcome(entry.name, error=entry.error(), skipped=entry.status is Status.UNAVAILABLE and not methods)
        for entry in entries
        if entry.status is not Status.ACTIVE
    ]
    if not active and not methods:
        raise UsageError("No certifier is available.", fix="`rsplugins plugins list` says why")
    return active, others


def _with_defaults(request: Request) -> Request:
    if not request.is_default or any(key.rpartition(".")[2] == "n" for key in request.settings):
        return request
    return replace(request, settings={"?n": DEFAULT_N, **request.settings})


def assign_settings(entries: Sequence[Entry], request: Request) -> tuple[dict[str, dict[str, Any]], list[Outcome]]:
    """Give each method the settings that are for it.

    A key goes to every method that has it; ``method.key`` goes to one method; a key that starts with ``?`` may go to none.

    Returns:
        The parameters by method, and outcomes for methods whose class cannot be imported.

    Raises:
        ParameterError: a key that no method has, with a did-you-mean.
        UnknownNameError: a method that is not among those asked for.
    """
    fields: dict[str, set[str]] = {}
    broken: list[Outcome] = []
    for entry in entries:
        try:
            fields[entry.name] = set(certifier_class(entry).Parameters.model_fields)
        except RspluginsError as error:
            broken.append(Outcome(entry.name, error=error))
    given: dict[str, dict[str, Any]] = {name: {} for name in fields}
    settings = dict(request.settings)
    if request.stop_at:
        settings["stop_at"] = list(request.stop_at)
    # Those for one method come last, so that they win.
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        for name in _takers(key, fields, broken):
            given[name][key.lstrip("?").rpartition(".")[2]] = value
    return given, broken


def _takers(key: str, fields: Mapping[str, set[str]], broken: Sequence[Outcome]) -> list[str]:
    method, dot, plain = key.lstrip("?").rpartition(".")
    if dot and method not in fields:
        if any(outcome.name == method for outcome in broken):
            return []
        raise UnknownNameError("method among those asked for", method, fields, fix=f"methods: {', '.join(sorted(fields))}")
    if not fields and broken and broken[0].error is not None:
        raise broken[0].error  # none of the methods could be made: why matters more than its parameters
    names = [method] if dot else list(fields)
    takers = [name for name in names if plain in fields[name]]
    if not takers and not key.startswith("?"):
        known = sorted(set().union(*(fields[name] for name in names)))
        who = f"The certifier {names[0]!r} has" if len(names) == 1 else "None of the certifiers has"
        name, one = ("a", "METHOD") if len(names) > 1 else ("no", names[0])
        raise ParameterError(
            f"{who} {name} parameter {plain!r}.{did_you_mean(plain, known)}",
            fix=where(plain) or f"Use one of: {', '.join(known)}; `rsplugins plugins show {one}` says more.",
        )
    return takers


def default_directory(request: Request) -> Path:
    """Return ``runs/MODEL-DATA-HASH``: the same request finds its run again, another one gets another directory."""
    chosen = request.execution
    asked = [request.model, request.data, request.methods, dict(request.settings), request.stop_at, request.start, request.stop]
    asked += [
        request.stride or 1,
        request.split,
        {**request.model_options, **({"denoiser": request.denoiser} if request.denoiser else {})},
        chosen.seed,
        chosen.dtype,
        chosen.compile,
        chosen.sound,
    ]
    asked += [dict(request.data_options)] if request.data_options else []
    if request.is_default and asked == [None, None, (), {}, (), 0, None, 1, "test", {}, 0, "float32", False, False]:
        return Path("runs/default")
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = "-".join(filter(None, (request.model or "default", request.data or "")))
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9.]+', '-', words).strip('-')}-{digest}"


def _load(request: Request) -> tuple[Classifier, Dataset, tuple[str, str]]:
    from rsplugins import models
    from rsplugins.data import DEFAULT_DATASET
    from rsplugins.data import load as load_data
    from rsplugins.denoising.door import denoise
    from rsplugins.machine.device import choose_device
    from rsplugins.models.store import DEFAULT_MODEL

    if (request.model is None) != (request.data is None):
        given, other = ("--model", "--data") if request.data is None else ("--data", "--model")
        raise UsageError(f"{given} is given without {other}.", fix="give both, or neither for the embedded default")
    reference, data = request.model or f"zoo:{DEFAULT_MODEL}", request.data or DEFAULT_DATASET
    with step(f"loading the model {reference}"):
        classifier = models.load(reference, **request.model_options)
        preparation = classifier.preparation
        if request.denoiser is not None:
            classifier = denoise(classifier, request.denoiser, sigma=_noise(request.settings))
        classifier.to(choose_device(request.device))
    with step(f"reading the data {data}"):
        dataset = load_data(
            data,
            root=request.data_root,
            split=request.split,
            input_size=classifier.input_size,
            preparation=preparation,
            **request.data_options,
        )
    dataset.check_classes(classifier.num_classes)
    return classifier, dataset, (reference, data)


def _noise(settings: Mapping[str, Any]) -> float:
    """Return the noise level of the settings, which has to be one for all methods."""
    found = {float(value) for name, value in settings.items() if name.rpartition(".")[2] == "sigma"}
    if len(found) > 1:
        raise UsageError(
            f"--denoiser needs one sigma; --set gives {len(found)}.",
            fix="Certify at one noise level a call, with --set sigma=0.25.",
        )
    return found.pop() if found else 0.25


def _select(request: Request, dataset: Dataset) -> list[int]:
    stop = request.stop
    if stop is None and request.is_default and request.start == 0 and request.stride in (None, 1):
        stop = min(DEFAULT_INPUTS, len(dataset))
    stride = request.stride or (1 if request.images is None else max(1, len(dataset) // request.images))
    return dataset.select(request.start, stop, stride)[: request.images]


@dataclass(frozen=True)
class _Job:
    """What all methods of a request share."""

    request: Request
    classifier: Classifier
    dataset: Dataset
    indices: list[int]
    names: tuple[str, str]
    progress: Progress


def _attempt(job: _Job, entry: Entry, parameters: Mapping[str, Any], directory: Path, *, conclude: bool) -> Outcome:
    request = job.request
    alone = len(request.methods) == 1 and conclude
    try:
        certifier = prepare(entry, job.classifier, parameters, request.execution)
    except RspluginsError as error:
        if alone:
            raise
        # Without a word from the user about this method, one that does not fit the model is no failure.
        unasked = not request.methods and not parameters.keys() - {"n"}
        return Outcome(entry.name, error=error, skipped=unasked and isinstance(error, ParameterError))
    try:
        run = execute(
            entry,
            certifier,
            job.dataset,
            job.indices,
            directory,
            shard=request.shard,
            progress=job.progress,
            model=job.names[0],
            data=job.names[1],
            command=request.command,
            conclude=conclude,
        )
    except RspluginsError as error:
        if alone:
            raise
        return Outcome(entry.name, error=error)
    return Outcome(entry.name, run=run)


def _agree(ranks: Ranks, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Let all ranks know each other's errors; rank 0 then merges the methods that went well everywhere."""
    if ranks.world == 1:
        return list(outcomes)
    agreed = []
    told = ranks.agree({outcome.name: outcome.error for outcome in outcomes})
    for outcome in outcomes:
        error = next((errors[outcome.name] for errors in told if errors.get(outcome.name)), None)
        run = outcome.run
        if error is None and run is not None and ranks.rank == 0:
            run = finish(run.directory)
        agreed.append(replace(outcome, error=error, run=None if error else run))
    return agreed


def _report(directory: Path, outcomes: Sequence[Outcome], *, single: bool) -> Path | None:
    runs = [outcome.run for outcome in outcomes if outcome.run is not None and outcome.run.rows]
    path = directory / REPORT
    if single or not runs:
        return path if path.exists() else None
    from rsplugins.runs.report import to_html

    write_whole(path, to_html(runs))
    return path
