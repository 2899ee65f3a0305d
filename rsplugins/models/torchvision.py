"""``torchvision:NAME``: image and video classifiers of torchvision, with the preprocessing of their weights inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models as zoo

from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import CheckpointError, ParameterError, UnknownNameError
from rsplugins.models import checkpoint

_FRAMES = 16
"""Frames of a clip, as the video models were trained; those that need another number say it in their weights."""


def load(
    reference: str,
    *,
    weights: str | None = "DEFAULT",
    checkpoint_path: str | Path | None = None,
    key: str | None = None,
    num_classes: int | None = None,
    frames: int | None = None,
) -> Classifier:
    """Load a torchvision classifier.

    Args:
        reference: a name of ``torchvision.models``, such as ``"resnet18"`` or, for video, ``"r3d_18"``.
        weights: ``"DEFAULT"``, another name of its weights (``"IMAGENET1K_V1"``), or None for random ones. Mean, std and size are
            those of the named weights, and of the default ones otherwise.
        checkpoint_path: local weights instead.
        key: the entry of a legacy checkpoint that holds the weights, when there are several.
        num_classes: outputs of the head, for local or random weights.
        frames: length T of the clips of a video model, (3, T, H, W); 16 by default, or what the weights ask for.

    Raises:
        UnknownNameError: no such model or weights; with a did-you-mean.
        CheckpointError: the weights are out of reach, or do not fit.
        ParameterError: an argument that does not go with the model.
    """
    video = zoo.list_models(module=zoo.video)
    known = [*zoo.list_models(module=zoo), *video]
    if reference not in known:
        raise UnknownNameError("torchvision classifier", reference, known)
    if frames is not None and reference not in video:
        raise ParameterError(f"frames is for video models; {reference} takes images.", fix=f"Video models: {', '.join(video)}.")
    chosen = _weights(reference, weights)
    from_download = checkpoint_path is None and weights is not None
    if from_download and num_classes not in (None, len(chosen.meta["categories"])):
        raise ParameterError(
            f"torchvision:{reference} has weights for {len(chosen.meta['categories'])} classes, not {num_classes}.",
            fix="Leave num_classes out, give checkpoint_path=PATH of a fine-tuned model, or weights=None for random weights.",
        )
    network = _create(reference, chosen if from_download else None, num_classes)
    if checkpoint_path is not None:
        checkpoint.fit(network, checkpoint.read(checkpoint_path, key), str(checkpoint_path))
    transforms = chosen.transforms()
    side = transforms.crop_size if len(transforms.crop_size) == 2 else transforms.crop_size * 2
    size = (3, *side)
    if reference in video:
        # the models that fix the number of frames say a minimum above 1
        least = int(chosen.meta.get("min_temporal_size", 1))
        size = (3, frames or max(least, _FRAMES), *side)
    classifier = wrap(network, mean=transforms.mean, std=transforms.std, input_size=size, source=f"torchvision:{reference}")
    if len(size) == 3:
        resize = list(transforms.resize_size)
        how = {"resize": resize[0] if len(resize) == 1 else resize, "interpolation": transforms.interpolation.value}
        classifier.preparation = how
    return classifier


def _weights(reference: str, name: str | None) -> Any:
    offered = zoo.get_model_weights(reference)
    if name in (None, "DEFAULT"):
        return offered.DEFAULT
    if name not in offered.__members__:
        raise UnknownNameError(f"weights of torchvision:{reference}", str(name), offered.__members__)
    return offered[str(name)]


def _create(reference: str, weights: Any, num_classes: int | None) -> nn.Module:
    # Two of the models otherwise spend seconds on initial values that nobody uses, and warn about it.
    options: dict[str, Any] = {"init_weights": False} if reference in ("googlenet", "inception_v3") and weights is None else {}
    if weights is None and num_classes is not None:
        options["num_classes"] = num_classes
    try:
        network: nn.Module = zoo.get_model(reference, weights=weights, **options)
        return network
    except OSError as error:
        raise CheckpointError(
            f"The weights of torchvision:{reference} could not be fetched: {error}",
            cause="no network, or the download server is out of reach from here.",
            fix="Download them elsewhere and give checkpoint_path=PATH, or use random weights with weights=None.",
        ) from error
