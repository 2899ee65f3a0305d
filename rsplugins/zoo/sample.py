"""Run a model again on a few of the inputs that its evidence is about, and compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from rsplugins.certification import check_inputs, prepare, run_certifier
from rsplugins.certifier import Execution
from rsplugins.classifier import Classifier
from rsplugins.data import Dataset
from rsplugins.data import load as load_data
from rsplugins.host import get_host
from rsplugins.runs.manifest import Manifest, current_parameters, read_manifest
from rsplugins.runs.record import Record, read_records
from rsplugins.zoo import evidence

CERTIFIED, PREDICTED, SAMPLES = 3, 64, 500
"""Inputs that are certified and predicted again, and noise samples an input."""
UNLIKELY = 1e-6
"""Votes whose share would differ that much by chance with this probability are said to differ."""
FAR = 5.0
"""Standard deviations by which means of scores may differ."""


def load_once(
    reference: str,
    split: str,
    classifier: Classifier,
    root: Path | None,
    loaded: dict[tuple[str, str], Dataset],
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Load a data set, or return it from those that were loaded before.

    Raises:
        DataNotFoundError: it is not here.
        PluginUnavailableError: what reads it is not installed.
    """
    key = (reference + (json.dumps(dict(options), sort_keys=True) if options else ""), split)
    if key not in loaded:
        loaded[key] = load_data(
            reference,
            root=root,
            split=split,
            input_size=classifier.input_size,
            preparation=classifier.preparation,
            **(options or {}),
        )
    return loaded[key]


def check(
    folder: Path, name: str, classifier: Classifier, root: Path | None, loaded: dict[tuple[str, str], Dataset]
) -> tuple[int, list[str]]:
    """Run a few inputs again.

    Args:
        folder: of the model.
        name: of the evidence.
        classifier: the model.
        root: where data sets lie.
        loaded: data sets by reference and split; filled.

    Returns:
        How many inputs were run, and what differs.

    Raises:
        DataNotFoundError, PluginUnavailableError: the data, or what the method needs, are not here.
    """
    directory = evidence.place(folder, name)
    run, records = read_manifest(directory), read_records(directory)
    data = load_once(run.data["reference"], run.data.get("split", "test"), classifier, root, loaded, run.data.get("options"))
    made = [record for record in records.values() if record.error is None]
    if made and "prediction" in made[0].evidence:
        # An attack's own coins depend on its batches; only what it started from is looked at.
        return _predicted(_spread(made, PREDICTED), classifier, data)
    return _certified(_spread(made, CERTIFIED), run, classifier, data)


def _predicted(chosen: Sequence[Record], classifier: Classifier, data: Dataset) -> tuple[int, list[str]]:
    import torch

    items = [data[record.index] for record in chosen]
    with torch.no_grad():
        found = classifier(torch.stack([image for image, _ in items]).to(classifier.device)).argmax(1).tolist()
    there = [(record.label, record.evidence["prediction"]) for record in chosen]
    here = [(label, int(predicted)) for (_, label), predicted in zip(items, found, strict=True)]
    wrong = [record.index for record, a, b in zip(chosen, there, here, strict=True) if a != b]
    # One input of 64 may differ: half precision, or another machine, can turn a tie.
    said = f"{len(wrong)} of {len(chosen)} predictions differ, such as that of input {wrong[0]}" if wrong else ""
    return len(chosen), [said] * (len(wrong) > max(1, len(chosen) // 64))


def _certified(chosen: Sequence[Record], run: Manifest, classifier: Classifier, data: Dataset) -> tuple[int, list[str]]:
    import torch

    indices = [record.index for record in chosen]
    images = torch.stack([data[index][0] for index in indices])
    parameters = current_parameters(run.parameters)
    if "n" in parameters:
        parameters["n"] = min(parameters["n"], SAMPLES)
    if "stop_at" in parameters:
        # A radius that the run decided may be out of reach of fewer samples.
        parameters["stop_at"] = ()
    entry = get_host().find("certifier", run.method)
    dtype: Any = run.dtype
    execution = Execution(seed=run.seed, dtype=dtype, compile=run.compile, sound=run.sound)
    certifier = prepare(entry, classifier, parameters, execution)
    check_inputs(certifier, images)
    problems = []
    for record, certificate in zip(chosen, run_certifier(entry, certifier, zip(indices, images, strict=True)), strict=True):
        if record.label != data[record.index][1]:
            problems.append(f"input {record.index} has label {data[record.index][1]}, recorded {record.label}")
        problems += [f"input {record.index}: {text}" for text in compare(record.evidence, certificate.evidence)]
    return len(chosen), problems


def compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between recorded evidence and that of a smaller run.

    Votes are compared by shares and scores by means, whose difference has to be one of chance; everything else has to agree up to
    rounding.

    Example:
        >>> list(compare({"estimation": {"3": 9000, "5": 1000}}, {"estimation": {"3": 90, "5": 10}}))
        []
        >>> list(compare({"estimation": {"3": 9000, "5": 1000}}, {"estimation": {"3": 10, "5": 90}}))[:1]
        ['estimation: class 3 had 9000 of 10000 votes, now 10 of 100']
    """
    for key, value in there.items():
        if key not in here:
            yield f"{key} is missing"
        elif _is_votes(value) and _is_votes(here[key]):
            yield from _compare_votes(key, value, here[key])
        elif _is_scores(value) and _is_scores(here[key]):
            yield from _compare_scores(key, value, here[key])
        elif key == "n":
            continue  # how many samples were drawn, which is what is smaller here
        elif not _close(value, here[key]):
            yield f"{key} was {_brief(value)}, now {_brief(here[key])}"


def _is_votes(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(count, int) for count in value.values())


def _compare_votes(key: str, there: Mapping[str, int], here: Mapping[str, int]) -> Iterator[str]:
    total, drawn = sum(there.values()), sum(here.values())
    for name, count in there.items():
        # One more vote each way, so that a unanimous record does not forbid a single vote that rounding changed.
        share, now = (count + 1) / (total + 2), here.get(name, 0)
        if binomtest(now, drawn, share).pvalue < UNLIKELY:
            yield f"{key}: class {name} had {count} of {total} votes, now {now} of {drawn}"


def _is_scores(value: Any) -> bool:
    return isinstance(value, Mapping) and {"n", "sums"} <= value.keys() and value["n"] > 0


def _compare_scores(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    # Scores lie in [0, 1], so a mean of n has a standard deviation of at most 0.5 / sqrt(n).
    allowed = FAR * 0.5 * math.sqrt(1 / there["n"] + 1 / here["n"])
    for name in there["sums"].keys() | here["sums"].keys():
        was, now = there["sums"].get(name, 0.0) / there["n"], here["sums"].get(name, 0.0) / here["n"]
        if abs(was - now) > allowed:
            yield f"{key}: class {name} had a mean score of {was:.4f}, now {now:.4f}"


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)
    return bool(a == b)


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _spread(values: Any, count: int) -> list[Any]:
    values = list(values)
    count = min(count, len(values))
    return [values[len(values) * k // count] for k in range(count)]
