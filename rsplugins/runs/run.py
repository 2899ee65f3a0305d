"""A run directory as read: its manifest, its rows, and what shows that it was edited."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsplugins.certificate import Certificate, Gathered
from rsplugins.errors import PluginUnavailableError, RunError
from rsplugins.runs.manifest import Manifest, read_manifest, read_values
from rsplugins.runs.record import RecordFile, read_files, united
from rsplugins.runs.rows import Row, claim_function, score
from rsplugins.runs.seals import MANIFEST, SEAL, manifest_problems, record_problems
from rsplugins.runs.stored import loaded
from rsplugins.runs.summary import summarise

_COLUMNS = (
    *("index", "label", "prediction", "radius", "correct", "abstained", "guarantee", "norm", "alpha", "rule"),
    *("samples", "seconds", "error"),
)
"""Of :meth:`Run.to_pandas`."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory as read: the manifest, and the rows in the order of its selection.

    Attributes:
        directory: where it is.
        manifest: what was run.
        rows: one a record.
        missing: the selected inputs that have no record yet.
        strays: the indices of records that the selection does not name.
        problems: what shows that the directory was edited; its numbers then stand in a table of their own.
    """

    directory: Path
    manifest: Manifest
    rows: tuple[Row, ...]
    missing: tuple[int, ...] = ()
    strays: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method, for tables and legends."""
        return self.manifest.method

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int]:
        """The true class of each input, in the order of :meth:`certificates`."""
        return [row.record.label for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the run, as its ``summary.json`` has them: ``accuracy``, ``acr``, ``curve``, ``guarantee``.

        A run that was edited certifies none: ``certifies`` is false then, and ``problems`` says why.
        """
        return copy.deepcopy(summarise(self))

    def certificates(self) -> list[Certificate]:
        """Return a certificate an input, as :func:`rsplugins.certify` does in memory, recomputed from the evidence.

        Raises:
            RunError: the run was edited: nothing of it is certified.
        """
        self._refuse_problems()
        return [certificate_of(row, self.manifest) for row in self.rows]

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row an input, by its index in the data set.

        Its columns: label, prediction (missing for an abstention), radius, correct, abstained, guarantee, norm, alpha, rule,
        samples, seconds, error.

        Raises:
            RunError: the run was edited.
            PluginUnavailableError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise PluginUnavailableError("pandas is not installed.", fix="pip install pandas") from error
        rows = [
            {
                "index": one.index,
                "label": row.record.label,
                "prediction": one.prediction,
                "radius": one.radius,
                "correct": row.correct,
                "abstained": one.abstained,
                "guarantee": str(one.guarantee),
                "norm": str(one.norm),
                "alpha": one.alpha,
                "rule": one.rule,
                "samples": one.samples,
                "seconds": one.seconds,
                "error": one.error,
            }
            for row, one in zip(self.rows, self.certificates(), strict=True)
        ]
        return pandas.DataFrame(rows, columns=_COLUMNS).set_index("index").astype({"prediction": "Int64", "alpha": "Float64"})

    def _refuse_problems(self) -> None:
        if self.problems:
            raise edited(self.directory, self.problems)


def certificate_of(row: Row, manifest: Manifest) -> Certificate:
    """Return what :func:`rsplugins.certify` would have returned for an input of a run."""
    record = row.record
    gathered = Gathered(record.index, loaded(record.evidence), record.samples, record.seconds, record.error)
    function = {"sha256": manifest.model.get("sha256"), "dtype": manifest.dtype, "compile": manifest.compile}
    function |= {"sound": manifest.sound, **manifest.function}
    if manifest.model.get("num_classes") is not None:
        function["num_classes"] = manifest.model["num_classes"]
    if manifest.imported is not None and row.claim is not None:
        said = row.claim
        return Certificate(
            *(record.index, manifest.method, row.prediction, row.radius, said.guarantee, said.norm, said.alpha),
            *(record.samples, record.seconds, gathered.evidence, manifest.parameters, function, said.rule, said.assumptions),
        )
    from rsplugins.certification import certificate_from
    from rsplugins.host import get_host

    entry = get_host().find("certifier", manifest.method)
    return certificate_from(gathered, row.claim, entry, parameters=manifest.parameters, function=function)


def open_run(directory: Path, *, manifest: Manifest | None = None, files: Mapping[Path, RecordFile] | None = None) -> Run:
    """Read a run directory and recompute its claims from the evidence.

    A directory whose seals do not fit is read all the same; the run's ``problems`` say what does not, and every table marks it.

    Args:
        directory: as ``rsplugins certify`` wrote it.
        manifest: replaces the directory's, as ``rescore`` does to change the confidence.
        files: its files of records, where they were read already.
    """
    files = read_files(directory) if files is None else files
    problems = seal_problems(directory, files)
    manifest = read_manifest(directory) if manifest is None else manifest
    records = united(files)
    selected = manifest.selection.indices()
    wanted = set(selected)
    kept = [records[index] for index in selected if index in records]
    rows = score(kept, claim_function(manifest), manifest.parameters)
    return Run(
        directory,
        manifest,
        tuple(rows),
        missing=tuple(index for index in selected if index not in records),
        strays=tuple(sorted(index for index in records if index not in wanted)),
        problems=tuple(problems),
    )


def seal_problems(directory: Path, files: Mapping[Path, RecordFile]) -> list[str]:
    """Return what the seals of the manifest and of the records say; nothing when all fit, or there are none."""
    values = read_values(directory) if (directory / MANIFEST).is_file() else {}
    problems = list(manifest_problems(values)) if values else []
    for path, contents in files.items():
        problems += record_problems(contents.records, str(values.get(SEAL) or ""), path.name)
    return problems


def refuse_edited(directory: Path, files: Mapping[Path, RecordFile] | None = None) -> None:
    """Raise unless the seals of a run directory fit, before anything is written that would hide that they do not.

    Args:
        directory: the run.
        files: its files of records, where they were read already.

    Raises:
        RunError: the manifest or a record was edited, or belongs to another run.
    """
    problems = seal_problems(directory, read_files(directory) if files is None else files)
    if problems:
        raise edited(directory, problems)


def edited(directory: Path, problems: Sequence[str]) -> RunError:
    """Return the error for a run directory whose seals do not fit."""
    return RunError(
        f"{directory} was edited: {problems[0]}" + (f", and {len(problems) - 1} more" if len(problems) > 1 else ""),
        cause="the manifest or a record was changed after it was written, or records of another run were put in",
        fix="restore the files, or certify again into an empty directory; `rsplugins merge A B` joins parts of one run",
    )
