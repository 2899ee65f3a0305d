"""``robustbench:NAME``: the model zoo of RobustBench, by name, data set and threat model as RobustBench calls them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision.models
from torch import nn

from rsplugins.classifier import Classifier, wrap
from rsplugins.compat import robustbench_imports
from rsplugins.errors import CheckpointError, ParameterError, UnknownNameError, UsageError
from rsplugins.models.files import check_file

_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def load(
    reference: str,
    *,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    model_dir: str | Path = "models",
    pretrained: bool = True,
) -> Classifier:
    """Load a RobustBench model. It normalises by itself, so no mean or std is added.

    Args:
        reference: its name, such as ``"Standard"``, or ``"cifar10/Linf/Standard"``.
        dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
        threat_model: ``"Linf"``, ``"L2"`` or ``"corruptions"``.
        model_dir: weights are looked for in ``model_dir/dataset/threat_model/NAME.pt``, and downloaded to it when not there.
        pretrained: False leaves random weights.

    Raises:
        UnknownNameError: no such data set, threat model or model; with a did-you-mean.
        CheckpointError: the weights cannot be fetched or do not fit.
    """
    parts = reference.split("/")
    if len(parts) == 3:
        dataset, threat_model, reference = parts
    elif len(parts) != 1:
        raise ParameterError(
            f"robustbench:{reference} is no name.", fix="Write robustbench:NAME or robustbench:DATASET/THREAT/NAME."
        )
    entry = find(dataset, threat_model, reference)
    if pretrained:
        network = _load(dataset, threat_model, reference, Path(model_dir), entry)
    else:
        network = build(dataset, threat_model, reference)
    return wrap(
        network,
        input_size=input_size(dataset, entry),
        num_classes=_CLASSES[dataset],
        source=f"robustbench:{dataset}/{threat_model}/{reference}",
    )


def catalogue() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return RobustBench's own table: data set -> threat model -> name -> entry.

    Raises:
        ImportError: RobustBench is not installed.
    """
    with robustbench_imports():
        from robustbench.model_zoo.models import model_dicts
    return {
        dataset.value: {threat.value: dict(models) for threat, models in threats.items()}
        for dataset, threats in model_dicts.items()
    }


def find(dataset: str, threat_model: str, name: str) -> dict[str, Any]:
    """Return the entry of a model in :func:`catalogue`.

    Raises:
        UnknownNameError: no such data set, threat model or model; with a did-you-mean.
    """
    table: dict[str, Any] = catalogue()
    where = "RobustBench"
    for kind, key in (("data set", dataset), ("threat model", threat_model), ("model", name)):
        if key not in table:
            raise UnknownNameError(f"{kind} of {where}", key, table)
        table, where = table[key], f"{where} {key}"
    return table


def input_size(dataset: str, entry: dict[str, Any]) -> tuple[int, int, int]:
    """Return the (C, H, W) a model is evaluated at: 32x32 on CIFAR, the crop of its preprocessing on ImageNet."""
    crop = re.search(r"(\d+)$", entry.get("preprocessing") or "")
    side = 32 if dataset.startswith("cifar") else int(crop.group(1)) if crop else 224
    return (3, side, side)


def build(dataset: str, threat_model: str, name: str) -> nn.Module:
    """Return the network of a model with random weights; nothing is downloaded.

    Raises:
        UnknownNameError: no such data set, threat model or model.
        UsageError: RobustBench's constructor fails on this machine; names the line and what to do.
    """
    import timm

    entry = find(dataset, threat_model, name)
    registered = f"{name.lower().replace('-', '_')}_{dataset}_{threat_model.lower()}"
    if timm.is_model(registered):
        return timm.create_model(registered, num_classes=_CLASSES[dataset], pretrained=False)
    resnet50 = torchvision.models.resnet50
    # `Standard_R50` asks torchvision for its weights while it is built.
    try:
        with mock.patch.object(torchvision.models, "resnet50", side_effect=lambda **_: resnet50()):
            network: nn.Module = entry["model"]()
    except Exception as error:
        raise _constructor_error(f"{dataset}/{threat_model}/{name}", error) from error
    return network


def _constructor_error(name: str, error: Exception) -> UsageError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "robustbench" in Path(frame.filename).parts]
    where = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    message = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:200]
    no_device = not torch.cuda.is_available() and any(word in str(error) for word in ("CUDA", "NVIDIA"))
    return UsageError(
        f"RobustBench cannot build {name} here: {type(error).__name__}{where}: {message}.",
        cause="its constructor puts tensors on a CUDA device."
        if no_device
        else "a dependency newer than this RobustBench expects.",
        fix="Use a machine with a CUDA device, or another model."
        if no_device
        else "Choose another model, or report it to RobustBench.",
    )


def _load(dataset: str, threat_model: str, name: str, model_dir: Path, entry: dict[str, Any]) -> nn.Module:
    with robustbench_imports():
        from robustbench.utils import load_model
    path = model_dir / dataset / threat_model / f"{name}.pt"
    ensemble = isinstance(entry.get("gdrive_id"), list)
    files = [path.with_name(f"{name}.pt_m{i}.pt") for i in range(len(entry["gdrive_id"]))] if ensemble else [path]
    for file in files:
        if file.is_file():
            check_file(file)
    there = all(file.is_file() for file in files)
    try:
        # Its messages go to standard output, which belongs to results; its torch.load must not unpickle (the default from 2.6).
        with contextlib.redirect_stdout(sys.stderr), mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):
            network: nn.Module = load_model(name, model_dir=model_dir, dataset=dataset, threat_model=threat_model)
            return network
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if there:
            raise CheckpointError(
                f"{path} could not be loaded: {type(error).__name__}: {message}",
                cause="a damaged file, weights of another model, or a checkpoint with more than tensors in it.",
                fix="Delete it and get it again; RobustBench's list of models has the addresses.",
            ) from error
        raise CheckpointError(
            f"The weights of robustbench:{dataset}/{threat_model}/{name} could not be fetched: {type(error).__name__}: {message}",
            cause="no network, or the download server is out of reach or over its quota.",
            fix=f"Download them elsewhere (file id {entry.get('gdrive_id')!r}) and save them as {', '.join(map(str, files))}; "
            "pretrained=False gives random weights.",
        ) from error
