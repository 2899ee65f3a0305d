"""Evidence that stays on disk until it is asked for, so that memory does not grow with what a run's records hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


class Source:
    """An open file of records. It stays the file that was read, whatever is put in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("rb")

    def line(self, offset: int, length: int) -> bytes:
        """Return a part of the file."""
        self._file.seek(offset)
        return self._file.read(length)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class StoredEvidence(Mapping[str, Any]):
    """The evidence of one record, read from its line whenever it is asked for, and never kept.

    Args:
        source: the file.
        offset: where the record's line begins.
        length: of the line, in bytes.
    """

    __slots__ = ("_length", "_offset", "_source")

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source, self._offset, self._length = source, offset, length

    def loaded(self) -> dict[str, Any]:
        """Return all of it."""
        found: dict[str, Any] = json.loads(self._source.line(self._offset, self._length))["evidence"]
        return found

    def __getitem__(self, key: str) -> Any:
        return self.loaded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded())

    def __len__(self) -> int:
        return len(self.loaded())

    def __eq__(self, other: object) -> bool:
        return self.loaded() == (other.loaded() if isinstance(other, StoredEvidence) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.loaded())


def loaded(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return evidence in memory, wherever it was: to be called once where several of its values are read."""
    return evidence.loaded() if isinstance(evidence, StoredEvidence) else evidence
