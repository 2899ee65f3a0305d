"""The weights of a zoo model: rounded to 16 bits where that costs nothing, in files below a limit."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsplugins.machine.files import write_whole
from rsplugins.models.manifest import Weights

if TYPE_CHECKING:
    from torch import nn

    from rsplugins.classifier import Classifier
    from rsplugins.data.table import Table
    from rsplugins.training.trainer import TrainingResult

LIMIT, HEADER = 16_000_000, 500_000
"""Bytes of one weights file, and those kept free for its list of tensors."""
LOSSLESS = 0.002
"""Accuracy that half precision may cost before float32 weights are kept."""


def half_precision(classifier: Classifier, test: Table) -> tuple[Classifier, str]:
    """Return the classifier with weights rounded to float16, and ``"float16"``; as it is, and ``"float32"``, where that costs.

    The weights are float32 again, with values that float16 holds: what is measured is what is stored.

    Args:
        classifier: in eval mode.
        test: on which the cost is measured.
    """
    import torch

    from rsplugins.models.checkpoint import own_state
    from rsplugins.training.trainer import accuracy

    rounded = copy.deepcopy(classifier)
    with torch.no_grad():
        for tensor in own_state(rounded.module).values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
    finite = all(bool(tensor.isfinite().all()) for tensor in rounded.module.state_dict().values())
    if finite and abs(accuracy(rounded, test) - accuracy(classifier, test)) <= LOSSLESS:
        return rounded, "float16"
    return classifier, "float32"


def save(folder: Path, module: nn.Module, dtype: Literal["float16", "float32"]) -> tuple[Weights, ...]:
    """Store the weights in as many files as the limit asks for."""
    from safetensors.torch import save as to_bytes

    from rsplugins.models.checkpoint import own_state

    for old in folder.glob("model*.safetensors"):
        old.unlink()
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in own_state(module).items():
        stored = tensor.detach().cpu().contiguous()
        # Counters stay whole numbers.
        stored = stored.half() if dtype == "float16" and stored.is_floating_point() else stored
        if size + stored.nbytes > LIMIT - HEADER and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
    written = []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        data = to_bytes(shard, metadata={"format": "pt"})
        write_whole(folder / name, data)
        written.append(Weights(file=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), dtype=dtype))
    return tuple(written)


def store(result: TrainingResult, test: Table, folder: Path) -> Classifier:
    """Store a trained model as ``rsplugins zoo add`` takes it, so that nothing that happens while measuring can lose it.

    Args:
        result: of :meth:`~rsplugins.training.trainer.Trainer.fit`.
        test: the test split, on the model's device.
        folder: where everything goes.

    Returns:
        The classifier with the weights as stored.
    """
    from rsplugins.training import files

    folder.mkdir(parents=True, exist_ok=True)
    classifier, dtype = half_precision(result.classifier, test)
    module = copy.deepcopy(classifier.module)
    # Counters stay whole numbers: Module.half() changes floating tensors only.
    stored = files.save_model(folder, module.half() if dtype == "float16" else module)
    for name in (files.RECIPE, files.METRICS, files.CURVES):
        if (result.directory / name).exists():
            shutil.copyfile(result.directory / name, folder / name)
    files.write_record(folder, {**result.record, "weights": {**stored, "dtype": dtype}})
    return classifier
