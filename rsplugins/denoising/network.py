"""A small residual denoiser, and files of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.errors import CheckpointError


class ResidualDenoiser(nn.Module):
    """Convolutions on space-to-depth input that predict the noise; told its level as a map. No batch statistics.

    In the manner of FFDNet (Zhang, Zuo, Zhang, TIP 2018): a ``factor`` of 2 makes a convolution four times as cheap.

    Args:
        channels: of the image.
        width: channels inside.
        depth: hidden convolutions.
        factor: of the space-to-depth step; sizes have to be multiples of it.
        levels: the range of noise levels that it is trained for.

    Example:
        >>> ResidualDenoiser(1, width=8, depth=1)(torch.rand(2, 1, 8, 8), torch.full((2, 1, 1, 1), 0.25)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, channels: int = 3, *, width: int = 64, depth: int = 4, factor: int = 2, levels: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        self.settings = {"channels": channels, "width": width, "depth": depth, "factor": factor, "levels": list(levels)}
        self.sigma, self.factor = (float(levels[0]), float(levels[1])), factor
        inner = channels * factor * factor
        self.first = nn.Conv2d(inner + 1, width, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, inner, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None  # by default
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the image (B, C, H, W), of noisy raw pixels and their noise level (B, 1, 1, 1)."""
        small = F.pixel_unshuffle(x, self.factor)
        y = F.relu(self.first(torch.cat([small, sigma.expand(-1, 1, *small.shape[-2:])], 1)))
        for layer in self.hidden:
            y = y + F.relu(layer(y))
        return x - F.pixel_shuffle(self.last(y), self.factor)


def save(denoiser: ResidualDenoiser, path: str | Path) -> None:
    """Write a denoiser to a safetensors file, its settings in the header."""
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, str(path), metadata={"residual-denoiser": json.dumps(denoiser.settings)})


def load(reference: str) -> nn.Module:
    """Load what :func:`save` wrote.

    Args:
        reference: the file.

    Raises:
        CheckpointError: there is none, or it holds no denoiser.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(reference).expanduser()
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.", fix="Give the file that rsplugins.denoising.network.save wrote.")
    try:
        with safe_open(str(path), "pt") as file:
            said = (file.metadata() or {}).get("residual-denoiser")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}", fix="Give a denoiser's file.") from error
    if said is None:
        raise CheckpointError(
            f"{path} holds no denoiser.",
            cause="a classifier's checkpoint, or a denoiser of another kind, whose network a file of weights does not say.",
            fix="Build the module in Python and pass it to rsplugins.denoise(classifier, module, sigma=...).",
        )
    settings: dict[str, Any] = json.loads(said)
    try:
        denoiser = ResidualDenoiser(**{**settings, "levels": tuple(settings["levels"])})
        denoiser.load_state_dict({name: value.float() for name, value in state.items()})
    except (TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold what its header says: {error}") from error
    if any(not bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError(f"{path} has weights that are NaN or infinite.", fix="Load another denoiser.")
    return denoiser.eval()
