"""``file:PATH``: a checkpoint file on this machine, for an architecture that the caller names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rsplugins.classifier import ChannelValues, Classifier, wrap
from rsplugins.errors import ParameterError
from rsplugins.models import architectures, checkpoint


def load(
    reference: str,
    *,
    architecture: str | Callable[..., nn.Module] | nn.Module | None = None,
    arguments: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    mean: ChannelValues | None = None,
    std: ChannelValues | None = None,
    input_size: Sequence[int] | None = None,
    resize: tuple[int, int] | None = None,
    key: str | None = None,
    match: str = "name",
) -> Classifier:
    """Load a checkpoint into a network.

    Args:
        reference: the file: ``.safetensors``, or ``.pt``/``.pth`` holding tensors only (anything else in it is refused, not run).
        architecture: the network: a name of :mod:`rsplugins.models.architectures`, ``"timm:NAME"``, ``"module:constructor"``, a
            constructor, or a
            module to fill.
        arguments: of the constructor.
        num_classes: passed to the constructor when it takes it, and checked.
        mean: by channel, on [0, 1] pixels, when the network does not normalise by itself.
        std: by channel, on [0, 1] pixels.
        input_size: (C, H, W) of the raw images.
        resize: (H, W) when the network needs another size than the raw images have.
        key: the entry of a legacy checkpoint that holds the weights, when there are several.
        match: ``"name"``, or ``"order"`` where the names are others; see :func:`rsplugins.models.checkpoint.fit`.

    Raises:
        CheckpointError: no checkpoint, or one that does not fit; with the keys and the likely reason.
        ParameterError: no architecture, or arguments that it does not take.
    """
    path = Path(reference).expanduser()
    state = checkpoint.read(path, key)
    network = _build(path, architecture, dict(arguments or {}), num_classes)
    checkpoint.fit(network, state, str(path), match=match)
    return wrap(
        network,
        mean=mean,
        std=std,
        input_size=input_size,
        num_classes=num_classes,
        resize=resize,
        source=f"file:{path.name}" + (" (weights by order)" if match == "order" else ""),
    )


def _build(path: Path, architecture: Any, arguments: dict[str, Any], num_classes: int | None) -> nn.Module:
    if isinstance(architecture, nn.Module):
        return architecture
    if architecture is None:
        raise ParameterError(
            f"file:{path.name} needs architecture=: a checkpoint holds numbers, not the network.",
            fix=f'Give architecture="module:constructor", or one of: {", ".join(sorted(architectures.ARCHITECTURES))}.',
        )
    constructor = architectures.resolve(architecture) if isinstance(architecture, str) else architecture
    if num_classes is not None and _takes(constructor, "num_classes"):
        arguments.setdefault("num_classes", num_classes)
    try:
        network = constructor(**arguments)
    except TypeError as error:
        raise ParameterError(f"The architecture does not take these arguments: {error}", fix="Correct arguments=.") from error
    if not isinstance(network, nn.Module):
        raise ParameterError(f"The architecture {architecture!r} made {type(network).__name__}, not a torch.nn.Module.")
    return network


def _takes(constructor: Callable[..., Any], name: str) -> bool:
    if isinstance(constructor, partial):
        return True  # of timm, whose models all take it
    try:
        return name in inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return False
