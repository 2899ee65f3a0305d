"""The manifest: every parameter of a run, and what ran it.

Part of it is the run's identity: two runs with the same identity have the same records but for times. Resuming compares it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsplugins.errors import RunError, UsageError
from rsplugins.machine.files import write_whole
from rsplugins.runs.seals import MANIFEST as MANIFEST
from rsplugins.runs.seals import SEAL, manifest_text

_COMPARED = ("noise", "dtype", "arithmetic", "operators")
"""What a certifier says about its function that records of one run have in common, whatever machine they were made on."""


_RENAMED = {"dtype": "precision"}
"""Parameters by the name that earlier releases gave them; no certifier may have one of these any more."""


_SINCE: dict[str, Any] = {"parameters.exclude": []}
"""Parameters that earlier releases did not have, with the value that their runs had all the same."""


class Selection(BaseModel):
    """Which inputs of the data set a run covers: a range, or a list when they are no range.

    Example:
        >>> Selection.of([0, 20, 40]).indices()
        [0, 20, 40]
        >>> Selection.of([3, 1, 2]).listed
        (3, 1, 2)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = 0
    stop: int = 0
    stride: int = 1
    listed: tuple[int, ...] | None = None

    @classmethod
    def of(cls, indices: Sequence[int]) -> Selection:
        """Describe stable indices, in the order they are certified.

        Raises:
            UsageError: an index appears twice, or there is none.
        """
        if not indices:
            raise UsageError("The selection has no inputs.", cause="--start is not below --stop, or the data set is empty")
        if len(set(indices)) != len(indices):
            raise UsageError("The selection names an input twice.", fix="give each index once")
        stride = indices[1] - indices[0] if len(indices) > 1 else 1
        if stride > 0 and list(indices) == list(range(indices[0], indices[-1] + 1, stride)):
            return cls(start=indices[0], stop=indices[-1] + 1, stride=stride)
        return cls(listed=tuple(indices))

    def indices(self) -> list[int]:
        """Return the stable indices in the order they are certified."""
        return list(range(self.start, self.stop, self.stride)) if self.listed is None else list(self.listed)


class Manifest(BaseModel):
    """What a run directory's ``manifest.json`` holds.

    Attributes:
        format: 2 since runs have seals (:mod:`rsplugins.runs.seals`); a run of format 1 is read and resumed as it is.
        method: the certifier's name.
        parameters: all of the certifier's parameters, as plain values.
        seed: of every random number.
        dtype: in which the model ran; with ``compile`` part of the function that is certified.
        compile: whether the model went through ``torch.compile``.
        sound: whether noise was drawn on the grid of 8-bit images.
        model: its reference, its fingerprint ``sha256``, and what it is.
        data: its reference, its fingerprint ``sha256``, and what it is.
        selection: which inputs.
        function: what else the certifier says about the function that is certified, such as its noise.
        execution: batch size, device: what results do not depend on.
        versions: of Python and of the distributions that matter.
        plugin: distribution and version that brought the certifier.
        command: the command line, where there was one.
        created: when, in ISO 8601.
        imported: for a log that another program wrote: the file, its sha256 and its dialect.
        rescored: for a run whose confidence was changed afterwards: the source's alpha and directory name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = 2
    method: str
    parameters: dict[str, Any]
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    sound: bool = False
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    selection: Selection
    function: dict[str, Any] = Field(default_factory=dict)
    execution: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    plugin: dict[str, str] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=list)
    created: str = ""
    imported: dict[str, Any] | None = None
    rescored: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the records, flat: ``{"parameters.sigma": 0.25, ...}``."""
        kept = {"method", "parameters", "seed", "dtype", "compile", "sound", "selection", "imported"}
        identity = self.model_dump(mode="json", include=kept)
        identity["parameters"] = current_parameters(identity["parameters"])
        # A model or data set may lie under another name or in another place: its fingerprint says what it is.
        for name, value in (("model", self.model), ("data", self.data)):
            kept_here = {key: value[key] for key in ("sha256", "structure") if key in value}
            identity[name] = kept_here if "sha256" in value else value
        # Not the versions: a run goes on after an update of rsplugins, whose version differs with every commit. What an update
        # changes in the function is in what the certifier says of it, and a record names the version that made it.
        identity["function"] = {key: self.function[key] for key in _COMPARED if key in self.function}
        return {key: value for key, value in _flat(identity).items() if key != "function"}


def current_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's parameters under the names that they have now: ``dtype`` of earlier releases' bounds is ``precision``.

    Example:
        >>> current_parameters({"norm": "linf", "dtype": "float64"})
        {'norm': 'linf', 'precision': 'float64'}
    """
    return {_RENAMED.get(name, name): value for name, value in parameters.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value})
    return flat


def difference(old: Manifest, new: Manifest) -> list[str]:
    """Return the lines ``key: old -> new`` for every setting in which two identities differ."""
    before, after = old.identity(), new.identity()
    keys = before.keys() | after.keys()
    for key, value in _SINCE.items():
        if key in after:
            before.setdefault(key, value)
    # Where a run of an earlier release says nothing, nothing is compared.
    optional = {"model.structure", *(f"function.{key}" for key in _COMPARED)}
    keys -= {key for key in optional if key not in before or key not in after}
    return [f"{key}: {_show(before, key)} -> {_show(after, key)}" for key in sorted(keys) if before.get(key) != after.get(key)]


def _show(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "(not set)"
    return text if len(text) <= 60 else text[:57] + "..."


def read_manifest(directory: Path) -> Manifest:
    """Read a run directory's manifest.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        fix = "give the directory that `rsplugins certify` wrote"
        inner = sorted(found.parent.name for found in directory.glob(f"*/{MANIFEST}")) if directory.is_dir() else []
        if inner:
            fix = f"it holds the runs {', '.join(inner)}: give one of them, such as {directory / inner[0]}"
        raise UsageError(f"{directory} is not a run directory: it has no {MANIFEST}.", fix=fix)
    try:
        return Manifest.model_validate({key: value for key, value in read_values(directory).items() if key != SEAL})
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(
            f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            cause="it was edited, or written by a newer version of rsplugins",
            fix="restore the file, or certify again into an empty directory",
        ) from None


def read_values(directory: Path) -> dict[str, Any]:
    """Read a run directory's manifest as the JSON object that it is, seal included.

    Raises:
        RunError: it is none.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}", cause="it was edited, or its copy is cut", fix="restore the file") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} is damaged: it is no JSON object", cause="it was edited", fix="restore the file")
    return values


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a new run, or check it against the one that is there.

    Returns:
        The manifest that the directory holds: the first writer's.

    Raises:
        UsageError: the directory holds a run with other parameters; the text lists each as ``key: old -> new``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / MANIFEST).exists() and any(directory.glob("records*.jsonl")):
        raise RunError(f"{directory} has records but no {MANIFEST}.", fix="use an empty directory")
    if write_whole(directory / MANIFEST, manifest_text(manifest), replace=False):
        return manifest
    there = read_manifest(directory)
    changed = difference(there, manifest)
    if changed:
        raise UsageError(
            f"{directory} holds a run with other parameters:\n    " + "\n    ".join(changed),
            cause="a run is resumed only with the parameters it was started with",
            fix="use another --out, or the old parameters",
        )
    return there
