"""Bring the records of shards together, and write what follows from a complete set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rsplugins.errors import UsageError
from rsplugins.machine.files import exclusive, lock, write_whole
from rsplugins.runs.derived import write_numbers, write_pages
from rsplugins.runs.manifest import Manifest, difference, read_manifest, write_manifest
from rsplugins.runs.record import RECORDS, Record, add, read_file, read_files, read_records, record_files, to_lines, united
from rsplugins.runs.run import Run, open_run, refuse_edited
from rsplugins.runs.seals import SEALED, forget_derived, run_seal, seal_record, write_digests


def finish(directory: Path, *, pages: bool = True) -> Run:
    """Merge shards when all inputs have records, and write results, summary and, when ``pages``, the curve and the report."""
    with exclusive(directory):
        files = read_files(directory)
        refuse_edited(directory, files)
        manifest = read_manifest(directory)
        records = united(files, say_torn=False)
        wanted = manifest.selection.indices()
        complete = all(index in records for index in wanted)
        alone = list(files) == [directory / RECORDS]
        if complete and not (alone and list(records) == wanted):
            with _locked(list(files)):
                _write(directory, manifest, records)
            files = read_files(directory)
        run = open_run(directory, manifest=manifest, files=files)
        if complete or alone:
            write_numbers(run)
            if pages:
                write_pages(run)
            if manifest.format >= SEALED:
                write_digests(directory, files)
    return run


def merge(directories: Sequence[Path], out: Path) -> Run:
    """Merge runs with the same identity, each with some of the records, into one directory.

    Args:
        directories: run directories, such as the shards' on several machines, or one that holds the files of all shards.
        out: where to; may be one of them.

    Raises:
        UsageError: they are not parts of one run; the text lists the difference.
        RunError: a shard is still being written, a part was edited, or two records contradict each other.
    """
    first = read_manifest(directories[0])
    union: dict[int, Record] = {}
    for directory in directories:
        part = read_manifest(directory)
        changed = difference(first, part)
        if part.format != first.format:
            changed.append(f"format: {first.format} -> {part.format} (runs of earlier releases have no seals)")
        if changed:
            raise UsageError(f"{directory} is not a part of the run {directories[0]}:\n    " + "\n    ".join(changed))
        refuse_edited(directory)
        with _locked(record_files(directory)):
            for path in record_files(directory):
                add(union, (_named(record, part, first) for record in read_file(path).records), path)
    manifest = write_manifest(out, first)
    refuse_edited(out)
    with exclusive(out), _locked(record_files(out)):
        add(union, read_records(out, say_torn=False).values(), out)
        forget_derived(out)
        # The parts of one run on several machines have manifests of their own; from here on the records are of this one.
        seal = run_seal(out)
        _write(out, manifest, {index: seal_record(record, seal) for index, record in union.items()})
    return finish(out)


def _named(record: Record, part: Manifest, first: Manifest) -> Record:
    """Return a record of a part with the version that made it, where it is not the one that the whole run's manifest names."""
    made, named = record.by or part.versions.get("rsplugins", ""), first.versions.get("rsplugins", "")
    return replace(record, by="" if made == named or first.format < SEALED else made)


def _write(directory: Path, manifest: Manifest, records: dict[int, Record]) -> None:
    """Write the main file in the order of the selection, then drop the shards' files, whose records it holds."""
    wanted = [records[index] for index in manifest.selection.indices() if index in records]
    write_whole(directory / RECORDS, to_lines(wanted))
    for path in record_files(directory):
        if path.name != RECORDS:
            path.unlink()


@contextmanager
def _locked(files: Sequence[Path]) -> Iterator[None]:
    with ExitStack() as stack:
        for path in files:
            lock(stack.enter_context(path.open("rb")), path)
        yield
