"""The model that a command was given, with what stands in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier

LEVEL = 0.25
"""The noise that a denoiser is told where the command draws none of its own."""


def load_behind(model: str, denoiser: str | None) -> Classifier:
    """Load a model by reference, behind a denoiser where one is named."""
    from rsplugins.denoising import denoise
    from rsplugins.models import load

    classifier = load(model)
    return classifier if denoiser is None else denoise(classifier, denoiser, sigma=LEVEL)
