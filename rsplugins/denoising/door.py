"""``rsplugins.denoise``: a denoiser, by module or by reference, in front of a classifier."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rsplugins.classifier import Classifier, wrap
from rsplugins.denoising.composition import Denoised, check_image, check_level
from rsplugins.errors import ParameterError, UsageError


def denoise(classifier: Classifier, denoiser: nn.Module | str, *, sigma: float, **options: Any) -> Classifier:
    """Put a denoiser in front of a classifier: a classifier again, of which each certifier certifies f(D(x)).

    Args:
        classifier: from :func:`rsplugins.wrap` or :func:`rsplugins.load`; it needs no training with noise.
        denoiser: a module from noisy raw pixels, and the noise level (B, 1, 1, 1) where its forward takes a second argument
            ``sigma``, to an image; put in eval mode, not copied. Or a reference, ``"scheme:name"``, of what plugins bring through
            ``rsplugins_denoisers``, such as ``"file:PATH"``.
        sigma: standard deviation of the noise on raw [0, 1] pixels.
        options: of the reference's source.

    Returns:
        The Classifier; its weights' digest is over both networks.

    Raises:
        ParameterError: sigma is not a finite number of at least 0, is not what the denoiser was made for, or the denoiser is no
            module.
        OutputValueError: an image of another shape, that is not finite, or on another scale than [0, 1].
        UsageError: ``classifier`` is none; or the denoiser is random, or its image depends on others of its batch.

    Example:
        >>> import torch
        >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> blurred = denoise(wrap(linear, input_size=(1, 2, 2)), nn.AvgPool2d(1), sigma=0.25)
        >>> blurred(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 2])
    """
    if not isinstance(classifier, Classifier):
        raise UsageError(
            f"denoise() takes a Classifier; it was given {type(classifier).__name__}.",
            fix="Wrap it first: rsplugins.wrap(module).",
        )
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not math.isfinite(sigma) or sigma < 0:
        raise ParameterError(f"sigma is {sigma!r}; allowed: a finite number of at least 0, on raw [0, 1] pixels.")
    reference = denoiser if isinstance(denoiser, str) else type(denoiser).__name__
    network = load_denoiser(denoiser, **options) if isinstance(denoiser, str) else denoiser
    if not isinstance(network, nn.Module):
        raise ParameterError(
            f"The denoiser is {type(network).__name__}; expected a torch.nn.Module or a reference.",
            fix="Write the function as the forward of a module.",
        )
    check_level(network, sigma)
    composed = Denoised(network.eval(), classifier, sigma, reference)
    if classifier.input_size is not None:
        check_image(composed, classifier.input_size, classifier.device)
    source = f"{classifier.source or 'a classifier'} behind the denoiser {reference} at {sigma:g}"
    found = wrap(composed, input_size=classifier.input_size, num_classes=classifier.num_classes, source=source)
    found.preparation = classifier.preparation
    return found


def load_denoiser(reference: str, **options: Any) -> nn.Module:
    """Load a denoiser by reference through the host.

    Raises:
        UsageError: no scheme, or an unknown one.
        ParameterError: an option that the source does not take.
    """
    from rsplugins.host import get_host
    from rsplugins.parameters import check_options

    scheme, colon, name = reference.partition(":")
    if not colon or not name:
        known = ", ".join(sorted(entry.name for entry in get_host().entries("denoiser")))
        raise UsageError(
            f"{reference!r} is no denoiser: it needs a scheme and a name.",
            fix=f'Write "scheme:name", such as "file:denoiser.safetensors"; the schemes are {known}.',
        )
    factory = get_host().find("denoiser", scheme).load()
    found: nn.Module = factory(name, **check_options(factory, options, f"{scheme}:"))
    return found
