"""Digests that make every edit of a run directory visible.

``manifest.json`` ends with ``seal``, a digest of all the rest of it. Each record repeats that seal as ``run``, and ends with a
``seal`` of its own over all of its fields. ``digests.json`` names the sha256 of every file. Nothing here is secret: who computes
all of them anew makes another run, which only a signature would tell from the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsplugins.machine.files import write_whole
from rsplugins.runs.record import Record, RecordFile, record_files

if TYPE_CHECKING:
    from rsplugins.runs.manifest import Manifest

MANIFEST, DIGESTS, SEAL = "manifest.json", "digests.json", "seal"
DERIVED = ("results.tsv", "summary.json", "curve.png", "report.html")
SEALED = 2
"""The ``format`` of manifests since which runs have seals."""
SHOWN = 5


def digest(value: Any) -> str:
    """Return 128 bits of the sha256 of a JSON value, written in one way, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def manifest_seal(values: Mapping[str, Any]) -> str:
    """Return the seal of a manifest, given as the JSON object that the file holds."""
    return digest({key: value for key, value in values.items() if key != SEAL})


def manifest_text(manifest: Manifest, *, indent: int = 2) -> str:
    """Return ``manifest.json`` of a run; a manifest of an earlier release's run stays without a seal."""
    values = manifest.model_dump(mode="json")
    if manifest.format >= SEALED:
        values[SEAL] = manifest_seal(values)
    return json.dumps(values, indent=indent, ensure_ascii=False) + "\n"


def manifest_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the seal says about a manifest, given as the JSON object that the file holds."""
    found = values.get(SEAL)
    if values.get("format") == 1 and found is None:
        return
    if found is None:
        yield f"{MANIFEST} has no seal, and its format is not that of an earlier release"
    elif found != manifest_seal(values):
        yield f"{MANIFEST} was edited: its seal does not fit what it says"


def run_seal(directory: Path) -> str:
    """Return the seal that a run's records repeat; nothing for a run of an earlier release.

    Raises:
        OSError, ValueError: there is no manifest, or it is no JSON.
    """
    values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return str(values.get(SEAL) or "")


def seal_record(record: Record, run: str) -> Record:
    """Return a record with its seals; without them when ``run`` is empty.

    Args:
        record: the record.
        run: the seal of its run's manifest.
    """
    bare = replace(record, run=run, seal="")
    return replace(bare, seal=digest(bare.fields())) if run else bare


def record_problems(records: Iterable[Record], run: str, name: str) -> Iterator[str]:
    """Yield what the seals say about the records of one file.

    Args:
        records: as read.
        run: the seal of the manifest; empty for a run of an earlier release.
        name: what the file is called.
    """
    foreign: list[int] = []
    edited: list[int] = []
    for record in records:
        if record.run != run or bool(record.seal) != bool(run):
            foreign.append(record.index)
        elif run and record.seal != digest({key: value for key, value in record.fields().items() if key != SEAL}):
            edited.append(record.index)
    if foreign:
        yield f"{name}: the records of inputs {some(foreign)} are not of the run that {MANIFEST} describes"
    if edited:
        yield f"{name}: the records of inputs {some(edited)} were edited: their seals do not fit what they say"


def write_digests(directory: Path, files: Mapping[Path, RecordFile] | None = None) -> None:
    """Write ``digests.json`` over the files that a run directory holds now.

    Args:
        directory: the run.
        files: its files of records as they are, where they were read already.
    """
    write_whole(directory / DIGESTS, digests_text(directory, files))


def digests_text(directory: Path, files: Mapping[Path, RecordFile] | None = None) -> str:
    """Return what ``digests.json`` has to say about a run directory as it is; see :func:`write_digests`."""
    read = {path.name: contents.sha256 for path, contents in (files or {}).items()}
    known = [directory / MANIFEST, *record_files(directory), *(directory / name for name in DERIVED)]
    found = {path.name: read.get(path.name) or hashlib.sha256(path.read_bytes()).hexdigest() for path in known if path.is_file()}
    return json.dumps(found, indent=1) + "\n"


def digest_problems(directory: Path, files: Mapping[Path, RecordFile] | None = None) -> Iterator[str]:
    """Yield the files that are not as ``digests.json`` says; that file has to be there. See :func:`write_digests`."""
    text, expected = (directory / DIGESTS).read_bytes(), digests_text(directory, files)
    if text == expected.encode():
        return
    here = json.loads(expected)
    try:
        there = dict(json.loads(text))
    except (ValueError, TypeError):
        yield f"{DIGESTS} is not a JSON object"
        return
    lines = []
    for name in sorted(here.keys() | there.keys(), key=str):
        if name not in here:
            lines.append(
                f"{name} is missing" if not (directory / name).exists() else f"{DIGESTS} names {name}, which is no file of a run"
            )
        elif name not in there:
            lines.append(f"{name} was put in later: {DIGESTS} does not name it")
        elif here[name] != there[name]:
            lines.append(f"{name} is not the file that {DIGESTS} names: one of the two was edited")
    yield from lines or [f"{DIGESTS} was edited"]


def forget_derived(directory: Path) -> None:
    """Remove what follows from the records, which are about to change; a run that is killed then says nothing outdated."""
    for name in (DIGESTS, *DERIVED):
        (directory / name).unlink(missing_ok=True)


def some(indices: Iterable[int]) -> str:
    """Name the first few indices."""
    found = list(indices)
    return ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
