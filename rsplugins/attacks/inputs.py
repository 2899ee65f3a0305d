"""What a training step was given: raw pixels and labels that its hooks can use, or an error that says what they are instead.

A hook counts eps, sigma and the box [0, 1] in raw pixels. On normalised images it would attack and clamp in other units, and
nothing would fail: the loss falls, and the network is robust to something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins import checks
from rsplugins.classifier import Classifier
from rsplugins.errors import InputValueError

_SUM_TOLERANCE = 1e-2
"""How far from 1 the entries of a soft label may sum: those of half precision do not sum to 1 exactly."""


def check_images(images: Any, model: nn.Module | None = None) -> None:
    """Check that images are raw pixels in [0, 1]; waits for the device.

    Args:
        images: (B, ...), as the loop has them.
        model: what they are given to, when known: whether it normalises by itself tells the likely cause.

    Raises:
        InputValueError: not floating, not finite, or outside [0, 1], with the likely cause.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        checks.check_shape(images, None, None)
    classifier = getattr(model, "_orig_mod", model)  # torch.compile keeps the module there
    checks.check_values(images, normalises=isinstance(classifier, Classifier) and classifier.mean is not None)


def as_labels(labels: Any, images: Tensor) -> Tensor:
    """Return labels as hooks take them: (B,) int64, or soft ones, (B, K) floating.

    Raises:
        InputValueError: labels of another shape or kind, with what they may be.
    """
    if not isinstance(labels, Tensor):
        raise _error(f"The labels are a {type(labels).__name__}; expected a tensor.", "Use torch.as_tensor(labels).")
    if labels.dim() == 2 and len(labels) == len(images) and labels.shape[1] > 1 and labels.dtype != torch.bool:
        return labels if labels.is_floating_point() else labels.float()  # one-hot
    if labels.shape != images.shape[:1]:
        fix = "Use labels.squeeze(1)." if labels.shape == (len(images), 1) else ""
        raise _error(f"The labels have shape {tuple(labels.shape)} for {len(images)} images; expected (B,), or (B, K).", fix)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise _error(f"The labels have dtype {labels.dtype}; expected class indices.", "Use labels.long().")
    return labels.long()


def check_labels(labels: Tensor, num_classes: int | None) -> None:
    """Check the values of labels; waits for the device.

    Raises:
        InputValueError: an index below 0 or above K - 1; soft labels that are no distributions over the classes.
    """
    if labels.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(labels))
    if labels.dim() == 2:
        sums = labels.detach().float().sum(1)
        if not bool((labels >= 0).all()) or not bool(((sums - 1).abs() <= _SUM_TOLERANCE).all()):
            raise InputValueError(
                f"The soft labels have entries from {low:.4g} to {high:.4g} and sums from {float(sums.min()):.4g} to "
                f"{float(sums.max()):.4g}; expected probabilities that sum to 1.",
                cause="targets of several classes at once, or scores.",
                fix="Give each image one class, or a distribution over the classes, as Mixup and CutMix make.",
            )
    elif low < 0 or (num_classes is not None and high >= num_classes):
        classes = "K classes" if num_classes is None else f"{num_classes} classes"
        raise InputValueError(
            f"The labels go from {int(low)} to {int(high)}; expected 0 to K - 1 of {classes}.",
            cause="labels that count from 1, a label for images to be ignored, or another data set's.",
            fix="Count the classes from 0, and leave out the images without one.",
        )


def _error(what: str, fix: str) -> InputValueError:
    return InputValueError(
        what,
        cause="labels of another task, or in another form.",
        fix=fix or "Pass one class index an image (B,), or soft labels as Mixup makes (B, K).",
    )


def hard(labels: Tensor) -> Tensor:
    """Return class indices (B,): the labels, or the most probable classes of soft ones."""
    return labels if labels.dim() == 1 else labels.argmax(1)


def full(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of logits (B, K) with labels (B,), or with soft labels (B, K) of any floating dtype."""
    return F.cross_entropy(logits, labels.to(logits.dtype) if labels.dim() == 2 else labels, reduction=reduction)
