"""The manifest of a model: what it is, what it was trained on, what may be claimed about it. Read without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import CheckpointError
from rsplugins.models.files import check_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "manifest.toml"

_SHA256 = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Weights(_Part):
    """One safetensors file; large models have several."""

    file: str = Field(pattern=r"^[\w.-]+\.safetensors$")
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(gt=0)
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """As stored; computed in float32 after loading."""


class Package(_Part):
    """Weights that lie in a package of the registry, not in the zoo."""

    distribution: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    version: str = Field(pattern=r"^\d[\w.+!-]*$")
    file: str = Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")
    """Below the folder that packages are installed in."""
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(gt=0)
    keys: Literal["name", "order"] = "name"
    """How the file's tensors become the network's: by name, or in order, each of its place's shape and kind."""
    data: str = Field(min_length=1)
    """A reference of ``rsplugins.data.load`` to the kind of images that it was trained on."""

    @property
    def requirement(self) -> str:
        """What pip installs."""
        return f"{self.distribution}=={self.version}"


class Licences(_Part):
    """Under which terms each part may be used."""

    code: str = Field(min_length=1)
    weights: str = Field(min_length=1)
    data: str = Field(min_length=1)


class InputSpec(_Part):
    """What goes in: raw images of ``shape`` in ``domain``, normalised inside by ``mean`` and ``std``."""

    domain: Literal["raw [0, 1] pixels"] = "raw [0, 1] pixels"
    shape: tuple[int, ...] = Field(min_length=3, max_length=4)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, int] | None = None


class Architecture(_Part):
    """A name of :mod:`rsplugins.models.architectures` (or ``module:attribute``) and its arguments."""

    name: str = Field(min_length=1)
    num_classes: int = Field(ge=2)
    arguments: dict[str, Any] = {}


class RecipeFile(_Part):
    """What ``rsplugins train`` turns into the weights, and the data it needs."""

    file: Literal["recipe.toml"] = "recipe.toml"
    sha256: str = Field(pattern=_SHA256)
    data: str = Field(min_length=1)
    """A reference of ``rsplugins.data.load``."""


class Training(_Part):
    """How the weights came about."""

    seed: int
    device: str = Field(min_length=1)
    minutes: float = Field(ge=0)
    epochs: int = Field(gt=0)
    arithmetic: str = ""
    """float32, or bfloat16 (autocast); empty where it was not recorded, as ``processor``."""
    processor: str = ""
    versions: dict[str, str] = {}
    notes: str = ""


class Result(_Part):
    """One number: what was measured, on what, and what it promises; ``guarantee`` is None for plain accuracy.

    ``records`` is the folder in ``records/`` with the evidence for each input, ``records_sha256`` that of its file with an entry
    an input. ``interval`` is at 95 %: what the number may be over the inputs that were not measured. ``stride`` is every how
    many-th input was taken; an attack without it took the first ones.
    """

    metric: str = Field(min_length=1)
    value: float
    data: str = Field(min_length=1)
    split: str = Field(min_length=1)
    images: int = Field(gt=0)
    stride: int | None = Field(default=None, gt=0)
    interval: tuple[float, float] | None = None
    guarantee: Guarantee | None = None
    norm: Norm | None = None
    radius: float | None = Field(default=None, ge=0)
    sigma: float | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    n: int | None = Field(default=None, gt=0)
    certifier: str = ""
    version: str = ""
    device: str = ""
    records: str = Field(pattern=r"^[\w-][\w.-]*$")
    records_sha256: str = Field(pattern=_SHA256)

    @model_validator(mode="after")
    def _evidence_for_claims(self) -> Result:
        if self.guarantee is not None and (self.norm is None or not self.certifier):
            raise ValueError("a result with a guarantee needs norm and certifier")
        if (self.guarantee is Guarantee.PROBABILISTIC) != (self.alpha is not None):
            raise ValueError("alpha belongs to a probabilistic result, and only there")
        return self


class Manifest(_Part):
    """A model of the zoo.

    Attributes:
        id: ``architecture.dataset-recipe-vN``.
        source: where the weights come from.
        no_weights: why there are none, and which data are needed to make them.
        function_sha256: ``Classifier.fingerprint()`` of the loaded model: what the evidence has to be about.
        recipe: how it was trained; none where the weights come in a package.
        package: the package of the registry that holds the weights.
        weights: the files, or none when ``no_weights`` says why.
    """

    schema_version: Literal[1] = 1
    id: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9]+(-[a-z0-9]+)+-v[1-9]\d*$")
    summary: str = Field(min_length=1)
    source: str = Field(min_length=1)
    paper: str = ""
    no_weights: str = ""
    function_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    licences: Licences
    input: InputSpec
    architecture: Architecture
    recipe: RecipeFile | None = None
    package: Package | None = None
    weights: tuple[Weights, ...] = ()
    training: Training | None = None
    results: tuple[Result, ...] = ()

    @model_validator(mode="after")
    def _weights_or_reason(self) -> Manifest:
        if bool(self.weights) + bool(self.no_weights) + (self.package is not None) != 1:
            raise ValueError("give weights, or a package that has them, or say in no_weights why there are none")
        if self.weights and self.training is None:
            raise ValueError("weights need a training section")
        if not self.no_weights and not self.function_sha256:
            raise ValueError("weights need function_sha256")
        if (self.recipe is None) != (self.package is not None):
            raise ValueError("give the recipe, or the package that holds the weights")
        if self.results and self.no_weights:
            raise ValueError("results need weights")
        return self

    @property
    def data(self) -> str:
        """The data set, as a reference of ``rsplugins.data.load``."""
        about = self.package or self.recipe
        assert about is not None  # one of them is there, or the manifest is refused
        return about.data


def read(path: Path) -> Manifest:
    """Read and check a manifest.

    Args:
        path: the file, or the folder it lies in.

    Raises:
        CheckpointError: unreadable, no TOML, or not as the schema wants; each wrong field is named.
    """
    path = path / FILE if path.is_dir() else path
    try:
        manifest = Manifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors()[:5])
        raise CheckpointError(f"{path} is not a valid manifest: {fields}.", fix="Correct these fields.") from None
    except (OSError, ValueError) as error:
        check_file(path)  # says when it is an HTML page or an LFS pointer
        raise CheckpointError(f"{path} cannot be read: {error}.", fix="Restore it, or remove the folder.") from error
    return manifest


def dumps(manifest: Manifest) -> str:
    """Return the manifest as TOML, with the fields that are set."""
    lines: list[str] = []
    _write_table(lines, "", {"schema_version": manifest.schema_version} | manifest.model_dump(mode="json", exclude_defaults=True))
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(lines: list[str], prefix: str, table: dict[str, Any]) -> None:
    later: list[tuple[str, Any]] = []
    for key, value in table.items():
        is_tables = isinstance(value, list) and value and isinstance(value[0], dict)
        if isinstance(value, dict) or is_tables:
            later.append((f"{prefix}{key}", value))
        elif value is not None:
            # JSON's strings, numbers, booleans and flat lists are TOML's too.
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    for name, value in later:
        for entry in value if isinstance(value, list) else [value]:
            lines.append(f"\n[[{name}]]" if isinstance(value, list) else f"\n[{name}]")
            _write_table(lines, f"{name}.", entry)


_TRAINING_ONLY = ("orthogonal",)
"""Arguments that say how weights are trained, not what is computed with them: in recipes, not in manifests."""


def stored(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network as a manifest keeps them: those that say how weights are trained are left out.

    Example:
        >>> stored({"width": 32, "orthogonal": True})
        {'width': 32}
    """
    return {name: value for name, value in arguments.items() if name not in _TRAINING_ONLY}
