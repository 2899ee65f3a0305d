"""``timm:NAME``: any classifier of timm, with the preprocessing of its ``pretrained_cfg`` inside."""

from __future__ import annotations

import contextlib
import inspect
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants
from torch import nn

from rsplugins.classifier import ChannelValues, Classifier, wrap
from rsplugins.errors import CheckpointError, ParameterError, UnknownNameError, did_you_mean, warn
from rsplugins.models import checkpoint

_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes by which timm takes models that are not in its own list: ``timm:hf-hub:OWNER/NAME``."""


def load(
    reference: str,
    *,
    pretrained: bool | None = None,
    checkpoint_path: str | Path | None = None,
    key: str | None = None,
    num_classes: int | None = None,
    mean: ChannelValues | None = None,
    std: ChannelValues | None = None,
    match: str = "name",
    **arguments: Any,
) -> Classifier:
    """Load a timm model.

    Args:
        reference: a timm name with or without tag, such as ``"resnet18"`` or ``"resnet18.a1_in1k"``; or
            ``"hf-hub:OWNER/NAME"``, ``"local-dir:PATH"`` as timm has them.
        pretrained: weights from the hub (or its local cache); by default yes, unless ``checkpoint_path`` is given. False leaves
            random weights.
        checkpoint_path: local weights instead: safetensors, or .pt/.pth holding tensors only.
        key: the entry of a legacy checkpoint that holds the weights, when there are several.
        num_classes: outputs of the head, for local or random weights; by default as in ``pretrained_cfg``.
        mean: in place of the one in ``pretrained_cfg``, for weights of your own.
        std: in place of the one in ``pretrained_cfg``, for weights of your own.
        match: ``"name"``, or ``"order"`` for local weights whose names are others; see
            :func:`rsplugins.models.checkpoint.fit`.
        arguments: passed on to ``timm.create_model``, such as ``img_size=``, ``in_chans=``.

    Raises:
        UnknownNameError: no such model or tag; with a did-you-mean.
        CheckpointError: the hub is out of reach, or the weights do not fit.
        ParameterError: the model has no classification head, or an argument it does not take.
    """
    if not reference.startswith(_ELSEWHERE):
        _check_name(reference)
    from_hub = checkpoint_path is None if pretrained is None else pretrained
    if from_hub and checkpoint_path is not None:
        raise ParameterError("pretrained=True and checkpoint_path name two sources of weights.", fix="Leave one of them out.")
    network = _create(reference, from_hub, num_classes, arguments)
    if checkpoint_path is not None:
        checkpoint.fit(network, checkpoint.read(checkpoint_path, key), str(checkpoint_path), match=match)
    spec: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    _check_head(reference, network, from_hub, num_classes)
    size = _input_size(spec, arguments)
    classifier = wrap(
        network,
        mean=_by_channel("mean", spec, size[0]) if mean is None else mean,
        std=_by_channel("std", spec, size[0]) if std is None else std,
        input_size=size,
        source=f"timm:{reference}" + (" (weights by order)" if match == "order" and checkpoint_path is not None else ""),
    )
    classifier.preparation = preparation(spec)
    return classifier


def preparation(spec: Any) -> dict[str, Any]:
    """Return what a ``pretrained_cfg`` says about how images are brought to the model's size."""
    return {key: spec.get(key) for key in ("crop_pct", "interpolation", "crop_mode", "mean")}


def _by_channel(name: str, spec: dict[str, Any], channels: int) -> Any:
    """Return mean or std for another number of channels: the average, as timm adapts the first layer's weights to all alike."""
    values = spec[name]
    if len(values) in (1, channels):
        return values
    average = sum(values) / len(values)
    warn(f"timm's {name} is for {len(values)} channels, and the model takes {channels}: the average, {average:.4g}, is used")
    return average


def _check_name(reference: str) -> None:
    name, _, tag = reference.partition(".")
    if not timm.is_model(name):
        raise UnknownNameError(
            "timm model", name, timm.list_models(), fix="List them: python -c 'import timm; print(timm.list_models())'."
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise UnknownNameError(f"pretrained tag of timm:{name}", tag, tags)


def _create(reference: str, from_hub: bool, num_classes: int | None, arguments: dict[str, Any]) -> nn.Module:
    options = arguments if num_classes is None else arguments | {"num_classes": num_classes}
    try:
        with _quick_refusal() if from_hub else contextlib.nullcontext():
            network: nn.Module = timm.create_model(reference, pretrained=from_hub, **options)
            return network
    except TypeError as error:
        raise _option_error(reference, error) from error
    except Exception as error:
        if not from_hub:
            raise
        raise _hub_error(reference, error) from error


def _option_error(reference: str, error: TypeError) -> ParameterError:
    fix = "See timm.create_model, or `rsplugins plugins show timm`."
    named = re.search(r"(?:(\w+)\.)?\w+\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if named is None:
        return ParameterError(f"timm:{reference} does not take these options: {error}", fix=fix)
    home = sys.modules[timm.model_entrypoint(reference).__module__] if timm.is_model(reference) else None
    takers = (load, timm.create_model, getattr(home, named[1] or "", None))
    known = {name for taker in takers if callable(taker) for name in inspect.signature(taker).parameters}
    guess = " Did you mean 'pretrained'?" if named[2] == "weights" else did_you_mean(named[2], known)  # torchvision's word for it
    return ParameterError(f"timm:{reference} takes no option {named[2]!r}.{guess}", fix=fix)


def _hub_error(reference: str, error: Exception) -> CheckpointError:
    if "No pretrained weights" in str(error) or "pretrained weights exist" in str(error):
        return CheckpointError(
            f"timm has no pretrained weights for {reference!r}.{did_you_mean(reference, timm.list_pretrained())}",
            fix="Take a model of timm.list_pretrained(), or give checkpoint_path=PATH.",
        )
    message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(
        f"The weights of timm:{reference} could not be fetched: {type(error).__name__}: {message}",
        cause="no network, or the model hub is out of reach from here, and the weights are not in its local cache.",
        fix="Download them elsewhere and give checkpoint_path=PATH, or use random weights with pretrained=False.",
    )


@contextlib.contextmanager
def _quick_refusal() -> Iterator[None]:
    """Use the local cache at once when the hub's name does not resolve; the hub's client would retry for most of a minute."""
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
        resolves = True
    except OSError:
        resolves = bool(urllib.request.getproxies())  # behind a proxy, names are resolved there
    with contextlib.nullcontext() if resolves else mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


def _check_head(reference: str, network: nn.Module, from_hub: bool, num_classes: int | None) -> None:
    spec: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    outputs = getattr(network, "num_classes", num_classes)
    if not outputs:
        raise ParameterError(
            f"timm:{reference} returns features: it has no classification head.",
            cause="its weights were trained without labels (self-supervised or image-text).",
            fix="Choose a tag fine-tuned on a data set, or give num_classes=K with checkpoint_path=PATH.",
        )
    if from_hub and outputs != spec["num_classes"]:
        raise ParameterError(
            f"timm:{reference} has weights for {spec['num_classes']} classes; num_classes={num_classes} would get a random head.",
            fix="Leave num_classes out, or give checkpoint_path=PATH of a fine-tuned model.",
        )


def _input_size(spec: dict[str, Any], arguments: dict[str, Any]) -> tuple[int, ...]:
    channels, height, width = spec["input_size"]
    channels = arguments.get("in_chans") or channels
    size = arguments.get("img_size") or (height, width)
    return (channels, *((size, size) if isinstance(size, int) else tuple(size)))
