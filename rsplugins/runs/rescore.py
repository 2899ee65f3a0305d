"""Recompute a run's claims at another confidence, from its evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rsplugins.errors import ParameterError, RunError
from rsplugins.machine.files import write_whole
from rsplugins.runs.derived import write_numbers
from rsplugins.runs.manifest import Manifest, write_manifest
from rsplugins.runs.record import RECORDS, to_lines
from rsplugins.runs.run import Run
from rsplugins.runs.seals import SEALED, run_seal, seal_record, write_digests


def with_alpha(run: Manifest, alpha: float, *, inputs: int | None = None) -> Manifest:
    """Return the manifest of a run re-scored at another confidence.

    Args:
        run: the manifest of the run.
        alpha: the probability of a false claim, in (0, 1).
        inputs: when given, ``alpha`` is for all of that many certificates together and each gets ``alpha / inputs`` (Bonferroni).

    Raises:
        ParameterError: alpha is outside (0, 1), or the method has none.
    """
    if not 0 < alpha < 1:
        raise ParameterError(f"alpha is {alpha:g}; allowed: above 0 and below 1", fix="a usual value is --alpha 0.001")
    if run.imported is not None:
        raise ParameterError("An imported log cannot be re-scored: it has radii, not the votes they were computed from.")
    if "alpha" not in run.parameters:
        raise ParameterError(f"The certifier {run.method!r} has no alpha: its guarantee does not depend on chance.")
    each = alpha if inputs is None else alpha / inputs
    note: dict[str, Any] = {"alpha_before": run.parameters["alpha"]}
    if inputs is not None:
        note |= {"dataset_alpha": alpha, "inputs": inputs}
    return run.model_copy(update={"parameters": {**run.parameters, "alpha": each}, "rescored": note})


def copy_rescored(run: Run, directory: Path) -> Run:
    """Write a re-scored run, with a copy of its records, into a directory of its own; return it.

    Raises:
        RunError: the run does not verify; its copy would.
    """
    if run.problems:
        raise RunError(
            f"{run.directory} does not verify, so no re-scored copy of it is written: {run.problems[0]}",
            cause="the directory was edited after it was written",
            fix="`rsplugins verify` lists everything that differs",
        )
    write_manifest(directory, run.manifest)
    seal = run_seal(directory)
    write_whole(directory / RECORDS, to_lines(seal_record(row.record, seal) for row in run.rows))
    moved = replace(run, directory=directory)
    write_numbers(moved)
    if run.manifest.format >= SEALED:
        write_digests(directory)
    return moved
