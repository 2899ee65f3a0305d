"""Records: the evidence for each input, one JSON line each, appended and flushed as it is known.

A run directory holds ``records.jsonl`` and, while shards work, ``records-I-of-N.jsonl``. What a reader sees is their union.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rsplugins.errors import RunError, warn
from rsplugins.machine.files import lock
from rsplugins.runs.stored import Source, StoredEvidence, loaded

RECORDS = "records.jsonl"
_PROVENANCE = ("by", "run", "seal")
_LARGE = 2**23
"""Bytes of a file of records above which evidence is read when it is asked for."""


@dataclass(frozen=True)
class Record:
    """The evidence for one input.

    Attributes:
        index: the input's stable index in its data set.
        label: its true class.
        evidence: plain JSON values, enough to recompute the claim; empty when ``error`` is set.
        samples: forward passes spent on it.
        seconds: wall-clock time spent on it.
        error: why the input failed, when it failed.
        clean: what the model predicts for the input without noise; no evidence, and absent in records of earlier releases.
        by: the version of rsplugins that made the record, where it is not the one that the manifest names: a resumed run.
        run: the seal of the run's manifest; see :mod:`rsplugins.runs.seals`. Empty in runs of earlier releases.
        seal: a digest of all other fields.
    """

    index: int
    label: int
    evidence: Mapping[str, Any]
    samples: int
    seconds: float
    error: str | None = None
    clean: int | None = None
    by: str = ""
    run: str = ""
    seal: str = ""

    def fields(self) -> dict[str, Any]:
        """Return what the record's line holds: all fields, the optional ones where they are set."""
        optional = {key for key in _PROVENANCE if not getattr(self, key)} | ({"clean"} if self.clean is None else set())
        found = {key: value for key, value in self.__dict__.items() if key not in optional}
        return {**found, "evidence": loaded(self.evidence)}

    def to_json(self, *, provenance: bool = True) -> str:
        """Return the record as one line of JSON, without the line end.

        Args:
            provenance: whether it says how long it took and what made it; otherwise equal results give equal lines.
        """
        fields = self.fields()
        if not provenance:
            fields = {key: value for key, value in fields.items() if key not in _PROVENANCE} | {"seconds": 0.0}
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """Read a record back.

        Raises:
            ValueError: when the line is not a record.

        Example:
            >>> record = Record(3, 1, {"votes": {"1": 10}}, 10, 0.5)
            >>> Record.from_json(record.to_json()) == record
            True
        """
        try:
            fields = json.loads(line)
            record = cls(**fields)
            if record.seal and "error" not in fields:
                raise ValueError("not a record: a sealed one has the field `error`")
            good = isinstance(record.index, int) and isinstance(record.label, int) and isinstance(record.evidence, dict)
            good = good and all(isinstance(getattr(record, key), str) for key in _PROVENANCE)
            good = good and (record.clean is None or type(record.clean) is int)
        except TypeError as error:
            raise ValueError(f"not a record: {error}") from None
        if not good:
            raise ValueError("not a record: index, label or evidence has the wrong type")
        return record

    def result(self) -> tuple[object, ...]:
        """Return everything but the time: what two runs with the same parameters agree on."""
        return self.index, self.label, dict(self.evidence), self.samples, self.error


class RecordFile(NamedTuple):
    """What a file of records held: the complete records in the order written, the bytes of a torn last line, and its sha256."""

    records: list[Record]
    torn: int
    sha256: str


def read_file(path: Path) -> RecordFile:
    """Read one file of records; a last line without a line end was torn by a kill and is left out.

    The evidence of a large file stays on disk: see :mod:`rsplugins.runs.stored`.

    Raises:
        RunError: a complete line is not a record.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    if not size:  # one that was made a moment ago, by this process or another shard's, is not even opened
        return RecordFile([], 0, digest.hexdigest())
    source = Source(path) if size > _LARGE else None
    records, offset, torn = [], 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if not line.endswith(b"\n"):
                torn = len(line)
                break
            try:
                record = Record.from_json(line)
            except ValueError as error:
                raise RunError(
                    f"{path} line {number} is not a record: {error}",
                    cause="the file was edited, or the disk or its copy is damaged",
                    fix="delete that line and run the same command again: it certifies the missing input once more",
                ) from None
            if source is not None:
                record = replace(record, evidence=StoredEvidence(source, offset, len(line)))
            records.append(record)
            offset += len(line)
    return RecordFile(records, torn, digest.hexdigest())


def record_files(directory: Path) -> list[Path]:
    """Return the files of records in a run directory: the main one first, then those of shards."""
    main = directory / RECORDS
    return ([main] if main.exists() else []) + sorted(directory.glob("records-*-of-*.jsonl"))


def shard_name(shard: tuple[int, int] | None) -> str:
    """Return the file name that a shard (i of n, from 0) writes to; the main file when there is none."""
    return RECORDS if shard is None else f"records-{shard[0]}-of-{shard[1]}.jsonl"


def read_files(directory: Path) -> dict[Path, RecordFile]:
    """Read all files of records in a run directory.

    Raises:
        RunError: a damaged line.
    """
    return {path: read_file(path) for path in record_files(directory)}


def read_records(directory: Path, *, say_torn: bool = True) -> dict[int, Record]:
    """Read the union of a directory's records, by index, in the order written.

    Args:
        directory: the run.
        say_torn: whether a torn last line is said; it is normal in a file that another shard is writing.

    Raises:
        RunError: a damaged line, or one index with two different results.
    """
    return united(read_files(directory), say_torn=say_torn)


def united(files: Mapping[Path, RecordFile], *, say_torn: bool = True) -> dict[int, Record]:
    """Do as :func:`read_records` with files that were read."""
    union: dict[int, Record] = {}
    for path, contents in files.items():
        if contents.torn and say_torn:
            warn(f"{path} ends in a torn line, which is left out; resuming the run repairs it")
        add(union, contents.records, path)
    return union


def add(union: dict[int, Record], records: Iterable[Record], source: Path) -> None:
    """Add records to a union by index, which they may repeat but not contradict."""
    for record in records:
        known = union.setdefault(record.index, record)
        if known is not record and known.result() != record.result():
            raise RunError(
                f"{source} contradicts another record of input {record.index}",
                cause="two runs with different settings wrote to one directory, or a record was edited",
                fix="delete one of the two lines, or certify again into an empty directory",
            )


class Writer:
    """Appends records to one file, flushed one at a time, with the file locked against a second writer.

    On entry a torn last line is cut off and said.

    Args:
        path: the file; made when it does not exist.
        finished: what is done to each record before it is written, such as sealing it.
    """

    def __init__(self, path: Path, finished: Callable[[Record], Record] | None = None) -> None:
        self.path = path
        self.finished = finished
        self.repaired = 0

    def __enter__(self) -> Writer:
        self._file = self.path.open("ab")
        lock(self._file, self.path)
        self.repaired = read_file(self.path).torn
        if self.repaired:
            self._file.truncate(self.path.stat().st_size - self.repaired)
            warn(f"repaired {self.path}: cut a torn last line of {self.repaired} bytes")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def append(self, record: Record) -> None:
        """Write one record and hand it to the operating system, so that killing this process cannot lose it."""
        written = record if self.finished is None else self.finished(record)
        self._file.write(written.to_json().encode() + b"\n")
        self._file.flush()


def to_lines(records: Iterable[Record]) -> Iterator[str]:
    """Yield the lines of a file of records."""
    for record in records:
        yield record.to_json() + "\n"
