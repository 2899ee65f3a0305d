"""One step of a diffusion model as a denoiser (Carlini et al., ICLR 2023), from models of the diffusers library."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.errors import CheckpointError, ParameterError

Prediction = Literal["epsilon", "sample", "v_prediction"]


class OneStep(nn.Module):
    """The image that a diffusion model expects behind a noisy one, in one pass.

    A variance-preserving model (DDPM) knows images in [-1, 1] as x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e. Noise of sigma on raw
    pixels is noise of 2 sigma there, so that the step t is the one with (1 - a_t) / a_t = (2 sigma)^2, the nearest in the
    logarithm, and the model is given sqrt(a_t) (2 x - 1). A variance-exploding one (score SDE) knows images in [0, 1] and is
    told sigma itself.

    Args:
        network: called as ``network(x, t)``; returns what ``prediction`` says, or an object with it in ``sample``. Channels
            beyond those of the image (a learned variance) are left out.
        alphas: (T,) the products a_t, falling; None for a variance-exploding network, which returns the score.
        prediction: the noise, the image, or the velocity sqrt(a_t) e - sqrt(1 - a_t) x_0.
        size: side of the images that the network knows; others are resized, in here, so that no radius changes. None for any.

    Raises:
        ParameterError: alphas that do not fall within (0, 1).
    """

    def __init__(
        self, network: nn.Module, alphas: Tensor | None, prediction: Prediction = "epsilon", size: int | None = None
    ) -> None:
        super().__init__()
        self.network, self.prediction, self.size = network, prediction, size
        self.register_buffer("alphas", None if alphas is None else alphas.detach().float().clone())
        self.alphas: Tensor | None
        if self.alphas is None:
            return
        inside = bool((self.alphas > 0).all() and (self.alphas < 1).all() and (self.alphas.diff() < 0).all())
        if self.alphas.dim() != 1 or not len(self.alphas) or not inside:
            raise ParameterError("The products of the schedule do not fall from 1 to 0.", fix="Give alphas_cumprod, (T,).")
        levels = ((1 - self.alphas) / self.alphas).sqrt() / 2
        self.sigma = (float(levels[0]) / 2, float(levels[-1]))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the image (B, C, H, W), of noisy raw pixels and their noise level (B, 1, 1, 1)."""
        found = self._at_size(x)
        found = self._exploding(found, sigma) if self.alphas is None else self._preserving(found, sigma, self.alphas)
        if found.shape[-2:] != x.shape[-2:]:
            found = F.interpolate(found, x.shape[-2:], mode="bilinear", antialias=True)
        return found

    def _at_size(self, x: Tensor) -> Tensor:
        if self.size is None or tuple(x.shape[-2:]) == (self.size, self.size):
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)

    def _preserving(self, x: Tensor, sigma: Tensor, alphas: Tensor) -> Tensor:
        known = (((1 - alphas) / alphas).sqrt() / 2).log()
        step = (known[None] - sigma.flatten(1)[:, :1].clamp_min(1e-12).log()).abs().argmin(1)
        alpha = alphas[step].view(-1, 1, 1, 1).to(x.dtype)
        at = alpha.sqrt() * (2 * x - 1)
        said = self._called(at, step, x.shape[1])
        if self.prediction == "epsilon":
            said = (at - (1 - alpha).sqrt() * said) / alpha.sqrt()
        elif self.prediction == "v_prediction":
            said = alpha.sqrt() * at - (1 - alpha).sqrt() * said
        return (said + 1) / 2

    def _exploding(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x + sigma * sigma * self._called(x, sigma.flatten(), x.shape[1])

    def _called(self, x: Tensor, time: Tensor, channels: int) -> Tensor:
        found = self.network(x, time)
        found = getattr(found, "sample", found)
        return found[:, :channels]  # type: ignore[no-any-return]


def load(reference: str) -> nn.Module:
    """Load the network and the schedule of a diffusers model: an unconditional one, in safetensors.

    Args:
        reference: a folder as ``save_pretrained`` writes it, or a name on the hub.

    Raises:
        CheckpointError: there is none, it is conditional, or its schedule is of a kind that one step is not known for.
    """
    import diffusers

    found = _loaded(diffusers.UNet2DModel, reference, "unet", use_safetensors=True)
    config: dict[str, Any] = _loaded(diffusers.DDPMScheduler, reference, "scheduler", method="load_config")
    name = str(config.get("_class_name", ""))
    kind = getattr(diffusers, name, None)
    size = found.config.sample_size
    size = int(size[0] if isinstance(size, (tuple, list)) else size) if size else None
    if found.config.class_embed_type is not None or found.config.num_class_embeds is not None:
        raise CheckpointError(f"{reference} is conditional on a class, which a denoiser does not know.", fix="Take another one.")
    if name == "ScoreSdeVeScheduler":
        return OneStep(found, None, size=size).eval()
    schedule = None if kind is None else kind.from_config(config)
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(getattr(schedule, "alphas_cumprod", None), Tensor) or prediction not in Prediction.__args__:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{reference} has the schedule {name or 'of no name'} with the prediction {prediction!r}.",
            cause="one step is known for schedules with alphas_cumprod (DDPM, DDIM) and for ScoreSdeVeScheduler.",
            fix="Build rsplugins.denoising.diffusion.OneStep yourself and pass it to rsplugins.denoise.",
        )
    assert schedule is not None  # it has the attribute
    return OneStep(found, schedule.alphas_cumprod, prediction, size).eval()


def _loaded(kind: Any, reference: str, folder: str, method: str = "from_pretrained", **options: Any) -> Any:
    """Load a part of a pipeline from its folder, or from a repository that holds one part alone."""
    first: Exception | None = None
    for place in ({"subfolder": folder}, {}):
        try:
            return getattr(kind, method)(reference, **place, **options)
        except (OSError, ValueError) as error:
            first = first or error
    assert first is not None  # both places failed
    raise CheckpointError(
        f"diffusers:{reference} has no {folder} that can be read: {(str(first).strip() or 'no message').splitlines()[0][:300]}",
        cause="no such folder or name, no network, or weights that are pickled (.bin), which are not loaded.",
        fix="Give a folder that save_pretrained wrote, with safetensors.",
    ) from first
