"""A small U-Net that removes Gaussian noise, and files of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.errors import CheckpointError, ParameterError


class UNetDenoiser(nn.Module):
    """A U-Net on space-to-depth input that predicts the noise; told its level as a map. No batch statistics.

    As FFDNet (Zhang, Zuo, Zhang, TIP 2018) it works on an image of which ``factor`` x ``factor`` pixels are one, which is what
    makes it cheap; as DRUNet (Zhang et al., TPAMI 2021) it has residual blocks without normalisation at each scale. One block
    costs the same at every scale. Images whose sides are no multiple of ``factor * 2 ** (scales - 1)`` are padded with zeros.

    Args:
        channels: of the image.
        width: channels inside, at the finest scale; they double with each coarser one.
        scales: how many; 1 is a plain residual network.
        blocks: residual blocks at each scale, on the way down and on the way up.
        factor: of the space-to-depth step.
        levels: the range of noise levels that it is trained for.

    Raises:
        ParameterError: a number that is not positive.

    Example:
        >>> UNetDenoiser(1, width=8, scales=2)(torch.rand(2, 1, 9, 8), torch.full((2, 1, 1, 1), 0.25)).shape
        torch.Size([2, 1, 9, 8])
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 32,
        scales: int = 3,
        blocks: int = 1,
        factor: int = 2,
        levels: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        numbers = {"channels": channels, "width": width, "scales": scales, "blocks": blocks, "factor": factor}
        if wrong := {name: value for name, value in numbers.items() if value < 1}:
            raise ParameterError(f"The denoiser's {next(iter(wrong))} is {next(iter(wrong.values()))}.", fix="Use at least 1.")
        self.settings = {**numbers, "levels": list(levels)}
        self.sigma, self.factor, self.multiple = (float(levels[0]), float(levels[1])), factor, factor * 2 ** (scales - 1)
        inner, widths = channels * factor * factor, [width * 2**scale for scale in range(scales)]
        self.first = nn.Conv2d(inner + 1, width, 3, padding=1)
        self.down = nn.ModuleList(_blocks(wide, blocks) for wide in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(wide, 2 * wide, 2, stride=2) for wide in widths[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * wide, wide, 2, stride=2) for wide in widths[:-1])
        self.up = nn.ModuleList(_blocks(wide, blocks) for wide in widths[:-1])
        self.last = nn.Conv2d(width, inner, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None  # by default
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the image (B, C, H, W), of noisy raw pixels and their noise level (B, 1, 1, 1)."""
        height, width = x.shape[-2:]
        below, right = -height % self.multiple, -width % self.multiple
        padded = F.pad(x, (0, right, 0, below)) if below or right else x
        small = F.pixel_unshuffle(padded, self.factor)
        y = self.first(torch.cat([small, sigma.expand(-1, 1, *small.shape[-2:])], 1))
        kept = []
        for scale, block in enumerate(self.down):
            y = block(y)
            if scale < len(self.shrink):
                kept.append(y)
                y = self.shrink[scale](y)
        for scale in reversed(range(len(self.grow))):
            y = self.up[scale](self.grow[scale](y) + kept[scale])
        noise: Tensor = F.pixel_shuffle(self.last(y), self.factor)[..., :height, :width]
        return x - noise


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(F.relu(self.first(x)))
        return found


def _blocks(width: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width) for _ in range(number)))


_HEADER = "unet-denoiser"


def save(denoiser: UNetDenoiser, path: str | Path) -> None:
    """Write a denoiser to a safetensors file, its settings in the header."""
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, str(path), metadata={_HEADER: json.dumps(denoiser.settings)})


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
            said = (file.metadata() or {}).get(_HEADER)
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
        denoiser = UNetDenoiser(**{**settings, "levels": tuple(settings["levels"])})
        denoiser.load_state_dict({name: value.float() for name, value in state.items()})
    except (TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold what its header says: {error}") from error
    if any(not bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError(f"{path} has weights that are NaN or infinite.", fix="Load another denoiser.")
    return denoiser.eval()
