"""A classifier behind a denoiser, f(D(x)): another function of raw pixels, of which each certifier's claims hold as they stand.

Cohen's theorem asks nothing of the function that votes. D sees the noisy image and constants alone; the samplers' checks refuse
one that mixes its batch, keeps state or draws noise of its own.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rsplugins.classifier import Classifier
from rsplugins.errors import OutputValueError, ParameterError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

SANE = 5.0
"""How many standard deviations of the noise denoised pixels may lie outside of [-1, 2]; further out is another scale."""


class Denoised(nn.Module):
    """A classifier behind a denoiser.

    Args:
        denoiser: from noisy raw pixels (B, C, H, W), and the noise level (B, 1, 1, 1) where its forward takes a second argument,
            to an image of the same shape.
        classifier: raw pixels to logits, its normalisation inside.
        sigma: the noise level that the denoiser is told, and made for.
        reference: where the denoiser comes from, for records.
        frozen: whether the classifier is another model, which stays as it is while the denoiser is trained, and whose weights
            are stored elsewhere.
    """

    elsewhere: tuple[str, ...] = ()
    """Prefixes in the state of what is another model, and not stored with this one."""

    def __init__(
        self, denoiser: nn.Module, classifier: Classifier, sigma: float, reference: str = "", *, frozen: bool = False
    ) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        self.sigma, self.reference, self.takes_sigma = float(sigma), reference, takes_sigma(denoiser)
        self.frozen = frozen
        if frozen:
            self.elsewhere = ("classifier.",)
            classifier.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser, and of the classifier where it is not frozen."""
        super().train(mode)
        if self.frozen:
            self.classifier.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of noisy raw pixels."""
        logits: Tensor = self.classifier(self.denoised(x))
        return logits

    def denoised(self, x: Tensor) -> Tensor:
        """Return the denoised image."""
        if not self.takes_sigma:
            plain: Tensor = self.denoiser(x)
            return plain
        level = x.new_full((x.shape[0], *(1,) * (x.dim() - 1)), self.sigma)
        found: Tensor = self.denoiser(x, level)
        return found

    def extra_repr(self) -> str:
        """Return the noise level and the reference, for ``repr`` and for what records say of the function's structure."""
        return f"sigma={self.sigma:g}, reference={self.reference!r}"


def takes_sigma(denoiser: nn.Module) -> bool:
    """Return whether a denoiser's forward takes the noise level as a second argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [each for each in inspect.signature(denoiser.forward).parameters.values() if each.kind in kinds]
    return len(given) > 1 and (given[1].default is inspect.Parameter.empty or given[1].name == "sigma")


def check_level(denoiser: nn.Module, sigma: float) -> None:
    """Hold a noise level against what a denoiser says it was made for, in an attribute ``sigma``: a number or a range.

    Raises:
        ParameterError: it is another one, and the denoiser cannot be told; or what it says is no level.
    """
    made = getattr(denoiser, "sigma", None)
    if made is None or isinstance(made, (Tensor, nn.Module)):
        return
    low, high = (made, made) if isinstance(made, (int, float)) else _pair(made)
    if low - 1e-9 <= sigma <= high + 1e-9:
        return
    said = f"The denoiser was made for sigma {low:g}" + (f" to {high:g}" if high > low else "") + f", not {sigma:g}."
    if not takes_sigma(denoiser):
        raise ParameterError(
            said,
            cause="it takes no noise level, so it removes as much as it was trained to.",
            fix="Take another denoiser, or sigma.",
        )
    warnings.warn(f"{said} It is told the level, but was not trained for it.", stacklevel=3)


def _pair(made: object) -> tuple[float, float]:
    if isinstance(made, (tuple, list)) and len(made) == 2 and all(isinstance(level, (int, float)) for level in made):
        return made[0], made[1]
    raise ParameterError(
        f"The denoiser says in its attribute sigma that it was made for {made!r}.",
        cause="that attribute is read as the noise level on raw [0, 1] pixels that it was made for.",
        fix="Let it be a number, or the smallest and the largest level.",
    )


def check_image(composed: Denoised, size: tuple[int, ...], device: torch.device) -> None:
    """Look at what a denoiser makes of noisy images, drawn for it.

    Raises:
        OutputValueError, UsageError: see :func:`denoise`.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((3, *size), generator=generator)
    noisy = (images + composed.sigma * torch.randn(images.shape, generator=generator)).to(device)
    with torch.no_grad():
        try:
            found = composed.denoised(noisy)
            again, alone = composed.denoised(noisy), composed.denoised(noisy[:1])
        except Exception as error:
            text = (str(error).strip() or "no message").splitlines()[0]
            raise OutputValueError(
                f"The denoiser fails on images of shape {size}: {type(error).__name__}: {text}",
                cause="a denoiser for another number of channels, another size, or another call than (x) or (x, sigma).",
                fix="Take one for these images.",
            ) from error
    if not isinstance(found, Tensor) or found.shape != noisy.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OutputValueError(
            f"The denoiser returned {shape} for images {tuple(noisy.shape)}.",
            cause="a denoiser for another number of channels, or one that returns the noise or several values.",
            fix="Return the denoised image alone.",
        )
    spread = SANE * composed.sigma
    if not bool(found.isfinite().all()) or float(found.min()) < -1 - spread or float(found.max()) > 2 + spread:
        raise OutputValueError(
            f"The denoised pixels range from {float(found.min()):g} to {float(found.max()):g}.",
            cause="a denoiser for images on another scale, such as [-1, 1] or [0, 255], or one that returns the noise.",
            fix="Map the scale inside the denoiser: it takes and returns raw [0, 1] pixels.",
        )
    if not torch.equal(found, again):
        raise UsageError(
            "The denoiser is random: two passes over the same images differ.",
            cause="it draws noise of its own, or dropout stays active.",
            fix="Make it a function of its input alone; one sample would cast two votes otherwise.",
        )
    if not torch.allclose(found[:1], alone, rtol=1e-3, atol=1e-3):
        raise UsageError(
            "The denoiser's image depends on the other images of its batch.",
            cause="statistics over the batch, such as batch normalisation without running statistics.",
            fix="Use running statistics, or normalise each image by itself.",
        )


def check_noise(classifier: Classifier, sigma: object, method: str) -> None:
    """Hold a certifier's noise against that of a denoiser in front of the classifier.

    Raises:
        ParameterError: the denoiser was told, or is made for, another level, and takes none.
    """
    composed = classifier.module
    if not isinstance(composed, Denoised) or not isinstance(sigma, (int, float)) or sigma == composed.sigma:
        return
    said = f"{method} draws noise of sigma {sigma:g}, and the denoiser in front of the classifier is for {composed.sigma:g}."
    if not composed.takes_sigma:
        raise ParameterError(said, fix=f"Use sigma={composed.sigma:g}, or another denoiser.")
    warnings.warn(f"{said} Use denoise(classifier, ..., sigma={sigma:g}).", stacklevel=2)
