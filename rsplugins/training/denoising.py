"""Training of denoisers for denoised smoothing (Salman et al., NeurIPS 2020) as hooks: squared error, and label stability.

The model is a denoiser in front of a classifier that stays as it is (architecture ``denoised``), and only the denoiser learns.
The noise level is on raw [0, 1] pixels; drawn anew for each image where it is a range, and told to the denoiser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.attacks.inputs import full
from rsplugins.denoising.composition import Denoised
from rsplugins.errors import ParameterError
from rsplugins.models import load
from rsplugins.parameters import Fraction, NonNegative, Settings, Sigma, Whole, settings
from rsplugins.training.hooks import Batch, Start, hookimpl

Range = tuple[Fraction, Sigma]


@settings
class Denoising(Settings):
    """Mean squared error of the denoised image, for one noise draw an image.

    Attributes:
        sigma: the noise level, or the smallest and the largest one: each image then draws its own, uniformly.
    """

    sigma: Sigma | Range

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sigma, tuple) and self.sigma[0] >= self.sigma[1]:
            raise ParameterError(f"sigma is {list(self.sigma)}.", fix="Write the smaller level first, or one number.")

    @hookimpl
    def on_start(self, start: Start) -> None:
        """Refuse a model that is no denoiser in front of a classifier, or one that cannot be told several levels."""
        if start.model is None:
            return
        composed = _composed(start.model)
        if isinstance(self.sigma, tuple) and not composed.takes_sigma:
            raise ParameterError(
                f"sigma is {list(self.sigma)}, and the denoiser takes no noise level.",
                fix="Train it at one level, or give its forward a second argument sigma.",
            )

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the squared error."""
        return self._error(batch, self._denoised(batch))

    def _denoised(self, batch: Batch) -> Tensor:
        images = batch.images
        composed, shape = _composed(batch.model), (len(images), *(1,) * (images.dim() - 1))
        low, high = self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)
        level = torch.empty(shape, device=images.device, dtype=images.dtype).uniform_(low, high, generator=batch.generator)
        noisy = images + level * batch.gaussian(images)
        found: Tensor = composed.denoiser(noisy, level) if composed.takes_sigma else composed.denoiser(noisy)
        return full(found)

    @staticmethod
    def _error(batch: Batch, found: Tensor) -> Tensor:
        error = F.mse_loss(found, batch.images)
        batch.metrics["squared_error"] = error.detach()
        return error


@settings
class DenoisingStability(Denoising):
    """Cross-entropy between the class of the denoised image and that of the clean one, through frozen classifiers.

    Attributes:
        classifiers: further models, by reference, besides the one behind the denoiser; the loss is the mean over all.
        squared_error: weight of the squared error, added.
        burn_in: first epoch with the classifiers; before it the squared error alone is minimised, which is cheaper. Let the
            weight bring both parts to one size, and clip the gradient: an optimizer such as Adam, used to gradients a thousand
            times smaller, takes a step that ruins the network where the cross-entropy begins.
    """

    classifiers: tuple[str, ...] = ()
    squared_error: NonNegative = 0.0
    burn_in: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._others: list[nn.Module] | None = None

    @hookimpl
    def on_start(self, start: Start) -> None:
        """Refuse what cannot work, and load the classifiers: what they lack is said before any epoch is spent."""
        super().on_start(start)
        if start.epochs is not None and self.burn_in >= start.epochs:
            raise ParameterError(
                f"burn_in is {self.burn_in} and the run has {start.epochs} epochs.", fix="Use a smaller one, or the hook denoise."
            )
        if start.model is not None:
            self._loaded()

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the objective; during burn-in the squared error with its weight (1 where it has none)."""
        found = self._denoised(batch)
        error = self._error(batch, found)
        if batch.epoch < self.burn_in:
            return (self.squared_error or 1.0) * error
        own = _composed(batch.model).classifier
        models = [own, *(model.to(batch.images.device) for model in self._loaded())]
        losses = []
        for model in models:
            with torch.no_grad():
                classes = model(batch.images).argmax(1)
            scores = full(model(found))
            losses.append(F.cross_entropy(scores, classes))
            if model is own:
                batch.metrics["stable"] = (scores.detach().argmax(1) == classes).float().mean()
        return torch.stack(losses).mean() + self.squared_error * error

    def _loaded(self) -> list[nn.Module]:
        if self._others is None:
            self._others = [load(reference).requires_grad_(False).eval() for reference in self.classifiers]
        return self._others


def _composed(model: nn.Module) -> Denoised:
    found = next((module for module in model.modules() if isinstance(module, Denoised)), None)
    if found is None:
        raise ParameterError(
            "The denoising hooks train a denoiser in front of a classifier, and this model is none.",
            fix='Use [model] architecture = "denoised" with arguments = {classifier = "zoo:ID"}, or rsplugins.denoise().',
        )
    return found
