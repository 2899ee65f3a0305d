"""Check a run directory: recompute every claim from the evidence, and compare with what the directory says."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rsplugins.runs.output import RESULTS, SUMMARY
from rsplugins.runs.record import read_file, record_files
from rsplugins.runs.scoring import Run, open_run
from rsplugins.runs.summary import summarise
from rsplugins.runs.tsv import HEADER, line

SHOWN = 5


def verify(directory: Path) -> tuple[Run, list[str]]:
    """Recompute every claim of a run without the model and without torch.

    Args:
        directory: the run.

    Returns:
        The run as recomputed, and one line for each thing that does not match; none when all is well.
    """
    run = open_run(directory)
    problems = [*_coverage(run), *_duplicates(directory)]
    if run.manifest.imported is not None:
        problems.append("imported log: there is no evidence to recompute its claims from")
    else:
        problems += _results(run)
    problems += _summary(run)
    return run, problems


def _coverage(run: Run) -> Iterator[str]:
    if run.missing:
        yield f"{len(run.missing)} selected inputs have no record: {_some(run.missing)}"
    if run.strays:
        yield f"{len(run.strays)} records are of inputs that were not selected: {_some(run.strays)}"


def _duplicates(directory: Path) -> Iterator[str]:
    for path in record_files(directory):
        contents = read_file(path)
        if contents.torn:
            yield f"{path.name} ends in a torn line"
        twice = [index for index, count in Counter(record.index for record in contents.records).items() if count > 1]
        if twice:
            yield f"{path.name} has more than one record for inputs {_some(twice)}"


def _results(run: Run) -> Iterator[str]:
    path = run.directory / RESULTS
    if not path.exists():
        yield f"{RESULTS} is missing"
        return
    header, *written = path.read_text(encoding="utf-8").splitlines() or [""]
    if header != HEADER:
        yield f"{RESULTS} has another header: {header!r}"
    pairs = zip_longest(map(line, run.rows), written)
    wrong = [(expected, found) for expected, found in pairs if expected != found]
    for expected, found in wrong[:SHOWN]:
        yield _mismatch(expected, found)
    if len(wrong) > SHOWN:
        yield f"{RESULTS}: {len(wrong) - SHOWN} more inputs differ"


def _mismatch(expected: str | None, found: str | None) -> str:
    if expected is None or found is None:
        return f"{RESULTS}: " + (
            f"no line for input {_index(expected)}" if found is None else f"a line without a record: {found!r}"
        )
    names = HEADER.split("\t")
    pairs = zip(names, expected.split("\t"), found.split("\t"), strict=False)
    differing = [f"{name} is {there}, recomputed {here}" for name, here, there in pairs if here != there]
    return f"{RESULTS}: input {_index(expected)}: " + ("; ".join(differing) or "the number of columns differs")


def _index(text: str | None) -> str:
    return (text or "").split("\t", 1)[0]


def _summary(run: Run) -> Iterator[str]:
    path = run.directory / SUMMARY
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield f"{SUMMARY} is missing"
        return
    except ValueError as error:
        yield f"{SUMMARY} is not JSON: {error}"
        return
    expected = summarise(run)
    for key in expected.keys() | written.keys() if isinstance(written, Mapping) else ():
        here, there = expected.get(key), written.get(key)
        if not _same(here, there):
            yield f"{SUMMARY}: {key} is {_brief(there)}, recomputed {_brief(here)}"


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_same, here, there))
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_same(here[key], there[key]) for key in here)
    if isinstance(here, float) and isinstance(there, (int, float)):
        return math.isclose(here, there, rel_tol=1e-12, abs_tol=1e-12)
    return bool(here == there)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(indices: Iterable[int]) -> str:
    found = list(indices)
    return ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
