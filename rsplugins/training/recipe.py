"""Recipes: the TOML file that says how a model is trained, checked completely before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rsplugins.errors import ParameterError, UsageError
from rsplugins.parameters import (
    Count,
    Eps,
    Flag,
    Fraction,
    NonNegative,
    Positive,
    Settings,
    Sigma,
    Whole,
    plain,
    read,
    settings,
)


@settings(frozen=True)
class DataSettings(Settings):
    """Where inputs come from and how they are augmented.

    Attributes:
        name: a reference of ``rsplugins.data.load``, such as ``"mnist"`` or ``"folder:cifar10"``.
        train: the training split.
        test: the split that is measured after each epoch; selection never uses it.
        input_size: (C, H, W) that photographs are resized and cropped to; None takes the images as they are.
        crop: pixels of zero padding for random crops; 0 for none.
        flip: whether images are mirrored at random.
        scale: smallest and largest share of the stored image's area that a random window takes, which is then resized to
            ``input_size``; None for the image as it is evaluated. Windows need the stored images, so these are streamed.
        resident: whether all images are kept in memory, on the device; False reads them as they are needed, in worker processes;
            None (leave it out) keeps what is below 8 GB and half of the free memory. The result is the same.
        workers: processes that read a streamed split; 0 reads in the trainer's own; None for one a core, 16 at most.
    """

    name: str
    train: str = "train"
    test: str = "test"
    input_size: tuple[Count, ...] | None = None
    crop: Whole = 0
    flip: Flag = False
    scale: tuple[Eps, Eps] | None = None
    resident: Flag | None = None
    workers: Whole | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is None:
            return
        if self.scale[0] > self.scale[1]:
            raise ParameterError(f"[data].scale is {list(self.scale)}.", fix="Write the smaller share first: [0.08, 1.0].")
        if self.resident or self.input_size is None:
            raise ParameterError(
                f"[data].scale is {list(self.scale)} with {'resident = true' if self.resident else 'no input_size'}.",
                cause="Random windows are cut from the stored images, of any size, and brought to input_size.",
                fix="Give input_size, and leave resident out; or use crop, which shifts images that are resident.",
            )


@settings(frozen=True)
class ModelSettings(Settings):
    """The network, with its normalisation inside.

    Attributes:
        architecture: a name in ``rsplugins.models.architectures``.
        mean: by channel, raw [0, 1] pixels.
        std: by channel.
        arguments: for the architecture.
    """

    architecture: str
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@settings(frozen=True)
class OptimizerSettings(Settings):
    """SGD, Adam or AdamW.

    Attributes:
        name: which.
        lr: the largest learning rate of the schedule.
        weight_decay: coupled for SGD and Adam, decoupled for AdamW.
        momentum: of SGD.
        nesterov: of SGD.
        clip_norm: largest gradient norm, or None.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    weight_decay: NonNegative = 5e-4
    momentum: Annotated[NonNegative, Field(le=0.9999)] = 0.9
    nesterov: Flag = False
    clip_norm: Positive | None = None


@settings(frozen=True)
class ScheduleSettings(Settings):
    """The learning rate over the run, as a factor of ``lr`` at each step.

    Attributes:
        name: ``"cosine"`` to 0, ``"multistep"`` by gamma at the milestones, ``"onecycle"`` (linear up and down), ``"constant"``.
        warmup: epochs of linear increase from 0; for onecycle the length of the way up.
        milestones: epochs, counted from 0, at which multistep multiplies by gamma.
        gamma: of multistep.
    """

    name: Literal["cosine", "multistep", "onecycle", "constant"] = "cosine"
    warmup: NonNegative = 0.0
    milestones: tuple[Count, ...] = ()
    gamma: Fraction = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name == "multistep") != bool(self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise ParameterError(
                f"[schedule] name is {self.name!r} with milestones {list(self.milestones)}.",
                fix='multistep, and only multistep, takes increasing milestones: name = "multistep", milestones = [30, 60].',
            )


@settings(frozen=True)
class TrainingSettings(Settings):
    """How long, how large and in which arithmetic.

    Attributes:
        epochs: passes over the training split.
        batch_size: over all ranks together.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast; weights stay float32). Float32 is used, said and recorded on a
            processor without bfloat16 units, and on a CPU whose bfloat16 gradients of the network cannot be trusted (3D
            convolutions; inputs narrower than a stride). A resumed run goes on in the arithmetic in which it began.
        channels_last: memory layout.
        compile: whether the model goes through ``torch.compile``.
        ema: decay of the averaged weights, which are then what is measured and saved; 0 for none.
        evaluate_every: epochs between measurements on the test split; the last epoch always is measured.
    """

    epochs: Count
    batch_size: Count = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: Flag = True
    compile: Flag = False
    ema: Annotated[NonNegative, Field(le=0.999999)] = 0.0
    evaluate_every: Count = 1


@settings(frozen=True)
class EvaluationSettings(Settings):
    """What is measured, and packed as evidence, once the model is trained (``zoo/train_all.py``).

    Attributes:
        sigma: certify by Gaussian smoothing at this level; None for not at all.
        n: samples an input.
        stride: every how many-th test input is certified.
        eps: attack with AutoAttack in this l-infinity ball, raw [0, 1] pixels; None for not at all.
        images: how many test inputs are attacked, spread over the split.
    """

    sigma: Sigma | None = None
    n: Count = 100_000
    stride: Count = 20
    eps: Eps | None = None
    images: Count = 1000


@settings(frozen=True)
class Recipe(Settings):
    """How a model is trained.

    Attributes:
        name: lower-case letters, digits, dots and hyphens: what the model will be called.
        seed: of every random number.
        data: see :class:`DataSettings`; ``model``, ``optimizer``, ``schedule``, ``training``, ``evaluation`` likewise.
        hooks: a table each: ``name`` and the settings of the training hook.
    """

    name: str
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    seed: Whole = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    hooks: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ParameterError(
                f"The recipe's name is {self.name!r}.",
                fix="Use lower-case letters, digits, dots and hyphens: it names the folder and the model.",
            )
        for table in self.hooks:
            if not isinstance(table.get("name"), str):
                raise ParameterError("A [[hooks]] table has no name.", fix='Write name = "gaussian", or another training hook.')
        for milestone in self.schedule.milestones:
            if milestone >= self.training.epochs:
                raise ParameterError(
                    f"[schedule] milestone {milestone} lies outside the {self.training.epochs} epochs.",
                    fix=f"Use milestones below {self.training.epochs}.",
                )
        if self.schedule.warmup >= self.training.epochs:
            raise ParameterError(
                f"[schedule] warmup takes {self.schedule.warmup:g} epochs and the run has {self.training.epochs}: the rate "
                "would only grow.",
                fix=f"Use a warmup below {self.training.epochs}, or train longer.",
            )

    def sha256(self) -> str:
        """Return the sha256 of :func:`to_toml`, the text that is kept beside the checkpoint."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()

    def identity(self) -> str:
        """Return :func:`to_toml` without what depends on the machine alone; runs of the same text may go on from each other."""
        return to_toml(dataclasses.replace(self, data=dataclasses.replace(self.data, resident=None, workers=None)))


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file.
        overrides: values by dotted key, such as ``{"training.epochs": 1}``.

    Raises:
        UsageError: no such file, or not TOML.
        ParameterError: an unknown key, a missing one or a wrong value.
    """
    path = Path(path).expanduser()
    try:
        values = _toml().loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no recipe {path}.", fix="Check the path; zoo/recipes holds those of the zoo.") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not a readable TOML file: {error}", fix="Correct that line.") from None
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    return read(Recipe, values, str(path.name))


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML that :func:`load_recipe` reads back as the same recipe."""
    values = plain(recipe)
    hooks, lines = values.pop("hooks"), []
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines += [f"{key} = {_value(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_value(value)}" for key, value in table.items() if value != {}]
    for hook in hooks:
        lines += ["", "[[hooks]]"]
        lines += [f"{key} = {_value(value)}" for key, value in hook.items()]
    return "\n".join(lines) + "\n"


def _toml() -> Any:
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for position, table in enumerate(tables):
        if table == "hooks" and isinstance(values.get("hooks"), list):
            raise UsageError(f"{key} cannot be set: hooks are a list.", fix="Edit the recipe's [[hooks]] tables.")
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UsageError(f"{'.'.join(tables[: position + 1])} is not a table of the recipe.", fix="Write TABLE.KEY=VALUE.")
    values[last] = value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_value(item)}' for key, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
