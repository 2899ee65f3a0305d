"""Sound noise for 8-bit images: integers, so that image plus noise is never rounded.

The guarantee and its proof: :mod:`rsplugins.statistics.grid`. The integers are drawn by inversion from 64 uniform bits. Of these,
16 decide nearly always: a table gives the value for every 16 leading bits whose cell no boundary cuts. For the others, about one
in a hundred, the remaining 48 bits are drawn too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsplugins.double import double
from rsplugins.errors import InputValueError
from rsplugins.execution import Execution
from rsplugins.sampling.noise import EXACT, GaussianNoise, NoiseSource, block_seed, too_coarse
from rsplugins.statistics.grid import LEVELS, boundaries

_LOW_BITS = 48
_ON_GRID = 1e-3  # of a step: what float32 makes of k/255 is off by less than 2e-5


class IntegerNoise(GaussianNoise):
    """Gaussian noise rounded to the grid k/255, added to images on that grid, in integers.

    Args:
        sigma: standard deviation of the Gaussian before rounding, in (0, 10], on [0, 1] pixels.
        seed: any integer.

    Example:
        >>> noise, out = IntegerNoise(0.25, seed=0), torch.empty(3, 4)
        >>> noise.perturb(torch.full((4,), 200 / 255), out, index=0, start=0)
        >>> bool((out * 255 - (out * 255).round()).abs().max() < 1e-4)
        True
    """

    name = "integer-grid-v1"

    def __init__(self, sigma: float, seed: int) -> None:
        super().__init__(sigma, seed)
        first, edges = boundaries(self.sigma)
        starts = np.arange(-(2**15), 2**15, dtype=np.int64) << _LOW_BITS
        lowest = np.searchsorted(edges, starts, side="right")
        highest = np.searchsorted(edges, starts + ((1 << _LOW_BITS) - 1), side="right")
        table = np.where(lowest == highest, lowest + first, np.nan).astype(np.float32)
        self._first = first
        self._tables = {torch.device("cpu"): (torch.from_numpy(table), torch.from_numpy(edges))}

    def perturb(self, image: Tensor, out: Tensor, index: int, start: int) -> None:
        """See :meth:`NoiseSource.perturb`; ``out`` is k/255 in its own dtype, a function of the integer k alone.

        Raises:
            ParameterError: ``image`` or ``out`` is coarser than float32, which would round the integers.
        """
        for tensor in (image, out):
            if tensor.dtype not in EXACT:
                raise too_coarse(tensor.dtype)
        super().perturb((image * LEVELS).round(), out, index, start)
        out.div_(LEVELS)

    def _draw(self, values: Tensor, index: int, block: int) -> None:
        device = values.device
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        generator.manual_seed(block_seed(self.seed, index, block))
        table, edges = self._table(device)
        flat = values.view(-1)
        leading = _bits(-(-flat.numel() // 4), generator, device).view(torch.int16)[: flat.numel()]
        drawn = torch.index_select(table, 0, leading.int().add_(2**15), out=flat if flat.dtype == table.dtype else None)
        cut = drawn.isnan().nonzero().view(-1)
        low = _bits(len(cut), generator, device) & ((1 << _LOW_BITS) - 1)
        uniform = (leading[cut].long() << _LOW_BITS) + low
        drawn[cut] = (torch.searchsorted(edges, uniform, right=True) + self._first).float()
        if drawn is not flat:
            flat.copy_(drawn)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            table, edges = self._tables[torch.device("cpu")]
            self._tables[device] = (table.to(device), edges.to(device))
        return self._tables[device]


def _bits(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return int64 numbers whose 64 bits are uniform."""
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def gaussian_noise(sigma: float, execution: Execution) -> NoiseSource:
    """Return the noise that a certifier adds to raw images: sound where the execution asks for it."""
    return IntegerNoise(sigma, execution.seed) if execution.sound else GaussianNoise(sigma, execution.seed)


def grid_evidence(execution: Execution, elements: int) -> dict[str, Any]:
    """Return what evidence has to say about sound noise on images of so many elements; nothing for the standard sampler."""
    return {"grid": {"levels": LEVELS, "elements": elements}} if execution.sound else {}


def check_on_grid(images: Tensor) -> None:
    """Check that images lie on the grid of 8-bit pixels.

    Raises:
        InputValueError: naming a value between two steps.
    """
    steps = double(images) * LEVELS
    off = (steps - steps.round()).abs() > _ON_GRID
    if bool(off.any()):
        value = float(images[off][0])
        raise InputValueError(
            f"Sound sampling needs images on the 8-bit grid k/255; one holds {value:.7g}, which is {value * LEVELS:.4f}/255.",
            cause="the images were resized, augmented or computed in floating point, or have other than 256 levels.",
            fix="Round them first, (images * 255).round() / 255, if those are the images you mean; or leave sound out.",
        )
