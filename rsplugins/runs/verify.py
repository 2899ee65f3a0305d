"""Check a run directory: its seals, every claim recomputed from the evidence, and what the directory says about both."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rsplugins.certificate import CLIPPED
from rsplugins.runs.derived import RESULTS, SUMMARY
from rsplugins.runs.record import RECORDS, RecordFile, read_files, record_files
from rsplugins.runs.run import Run, open_run
from rsplugins.runs.seals import DIGESTS, SEALED, SHOWN, digest_problems, some
from rsplugins.runs.summary import summarise
from rsplugins.runs.tsv import MARK, header, line, mark, outdated_line

IMPORTED = "imported log: there is no evidence to recompute its claims from"


@dataclass(frozen=True)
class Findings:
    """What was found out about a run directory.

    Attributes:
        run: as recomputed.
        edited: what does not fit together: somebody changed a file, or records of another run were put in.
        unfinished: what is not there yet, or was left by a kill: running the command again mends it.
        notes: what could not be checked, and what a reader should know besides.
    """

    run: Run
    edited: list[str]
    unfinished: list[str]
    notes: list[str]

    @property
    def verifiable(self) -> bool:
        """Whether there is evidence to recompute the claims from; an imported log has none."""
        return self.run.manifest.imported is None

    @property
    def problems(self) -> list[str]:
        """One line for each thing that keeps the run from being verified; none when all is well."""
        return [*self.unfinished, *([] if self.verifiable else [IMPORTED]), *self.edited]


def verify(directory: Path) -> tuple[Run, list[str]]:
    """Recompute every claim of a run without the model and without torch.

    Args:
        directory: the run.

    Returns:
        The run as recomputed, and one line for each thing that does not match; none when all is well.
    """
    found = examine(directory)
    return found.run, found.problems


def examine(directory: Path) -> Findings:
    """Do as :func:`verify`, and tell edited files from unfinished runs and from what cannot be checked.

    Raises:
        UsageError: no run directory.
        RunError: a file cannot be read at all, or records contradict each other.
    """
    files = read_files(directory)
    run = open_run(directory, files=files)
    edited = list(run.problems)
    unfinished = [*_missing(run), *_torn(files)]
    plain = replace(run, problems=())
    edited += [*_strays(run), *_duplicates(files), *_order(run, files)]
    for path, check in ((directory / RESULTS, _results), (directory / SUMMARY, _summary)):
        if path.exists():
            edited += check(plain)
        else:
            unfinished.append(f"{path.name} is missing")
    if run.manifest.format >= SEALED:
        if (directory / DIGESTS).is_file():
            edited += digest_problems(directory, files)
        else:
            unfinished.append(f"{DIGESTS} is missing, so results and pages cannot be checked")
    elif (directory / DIGESTS).exists():
        edited.append(f"{DIGESTS} is there, and the manifest is of an earlier release, which wrote none")
    return Findings(run, edited, unfinished, list(_notes(run)))


def _missing(run: Run) -> Iterator[str]:
    if run.missing:
        yield f"{len(run.missing)} selected inputs have no record: {some(run.missing)}"


def _strays(run: Run) -> Iterator[str]:
    if run.strays:
        yield f"{len(run.strays)} records are of inputs that were not selected: {some(run.strays)}"


def _torn(files: Mapping[Path, RecordFile]) -> Iterator[str]:
    for path, contents in files.items():
        if contents.torn:
            yield f"{path.name} ends in a torn line"


def _duplicates(files: Mapping[Path, RecordFile]) -> Iterator[str]:
    for path, contents in files.items():
        counts = Counter(record.index for record in contents.records)
        twice = [index for index, count in counts.items() if count > 1]
        if twice:
            yield f"{path.name} has more than one record for inputs {some(twice)}"


def _order(run: Run, files: Mapping[Path, RecordFile]) -> Iterator[str]:
    """Yield when a finished run's records are not in the order of its selection, in which they were written."""
    if run.missing or [path.name for path in files] != [RECORDS]:
        return
    wanted = {index: place for place, index in enumerate(run.manifest.selection.indices())}
    (contents,) = files.values()
    places = [wanted[record.index] for record in contents.records if record.index in wanted]
    if places != sorted(places):
        yield f"{RECORDS} is not in the order of the selection"


def _notes(run: Run) -> Iterator[str]:
    if run.manifest.format < SEALED:
        yield (
            "the run is of an earlier release, without seals: edits of its manifest that leave the claims as they are (seed, "
            "dtype, sha256 of model and data), of times, and of pages cannot be noticed"
        )
    makers = Counter(row.record.by for row in run.rows if row.record.by)
    named = run.manifest.versions.get("rsplugins", "an unknown version")
    for maker, count in makers.items():
        yield f"{count} records were made by rsplugins {maker}, the others by {named}"
    known = {path.name for path in record_files(run.directory)} | {"manifest.json", DIGESTS, RESULTS, SUMMARY}
    others = {path.name for path in run.directory.iterdir()} - known - {"curve.png", "report.html"}
    if others:
        yield f"not of the run, and not checked: {', '.join(sorted(others)[:SHOWN])}"


def _results(run: Run) -> Iterator[str]:
    path = run.directory / RESULTS
    first, *written = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    old = run.manifest.format < SEALED
    if first != header(run.rows) and not (old and first == header(())):
        yield f"{RESULTS} has another header: {first!r}"
    # An earlier release printed six digits of the binary expansion.
    sign = mark(run.rows)
    expected = [(line(row, sign), outdated_line(row) if old else "") for row in run.rows]
    wrong = [(here, there) for here, there in zip_longest(expected, written) if not _same_line(here, there)]
    for here, there in wrong[:SHOWN]:
        yield _mismatch(here[0] if here else None, there, first)
    if len(wrong) > SHOWN:
        yield f"{RESULTS}: {len(wrong) - SHOWN} more inputs differ"


def _same_line(expected: tuple[str, str] | None, found: str | None) -> bool:
    if expected is None or found is None:
        return False
    here, there = expected[0].split("\t"), found.split("\t")
    # The last digits of a radius may depend on the version of scipy that recomputes it; an edit of them is seen in digests.json.
    return found in expected or (here[:3] + here[4:] == there[:3] + there[4:] and _close(here[3], there[3]))


def _close(here: str, there: str) -> bool:
    if here.startswith(MARK) != there.startswith(MARK):
        return False
    try:
        return math.isclose(float(here.removeprefix(MARK)), float(there.removeprefix(MARK)), rel_tol=1e-12, abs_tol=0.0)
    except ValueError:
        return False


def _mismatch(expected: str | None, found: str | None, names: str) -> str:
    if expected is None or found is None:
        return f"{RESULTS}: " + (
            f"no line for input {_index(expected)}" if found is None else f"a line without a record: {found!r}"
        )
    pairs = zip(names.split("\t"), expected.split("\t"), found.split("\t"), strict=False)
    differing = [f"{name} is {there}, recomputed {here}" for name, here, there in pairs if here != there]
    return f"{RESULTS}: input {_index(expected)}: " + ("; ".join(differing) or "the number of columns differs")


def _index(text: str | None) -> str:
    return (text or "").split("\t", 1)[0]


def _summary(run: Run) -> Iterator[str]:
    path = run.directory / SUMMARY
    try:
        written = json.loads(path.read_bytes())
    except ValueError as error:
        yield f"{SUMMARY} is not JSON: {error}"
        return
    if not isinstance(written, Mapping):
        yield f"{SUMMARY} is no JSON object"
        return
    expected = summarise(run)
    for key in sorted(expected.keys() | written.keys()):
        here, there = expected.get(key), written.get(key)
        if key == "assumptions" and isinstance(here, list) and isinstance(there, list) and CLIPPED not in there:
            here = [text for text in here if text != CLIPPED]  # earlier releases did not say it
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
