"""Noise that is a function of (seed, input index, sample index) alone.

Samples are drawn in blocks of fixed size, each from a generator seeded for that block, so that any sample can be drawn again
without the ones before it, and long runs of samples cost no more than one call of ``normal_`` a block.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any, Protocol

import torch
from torch import Tensor

from rsplugins.errors import ParameterError

EXACT = (torch.float32, torch.float64)
"""Formats that noise may be added in: they hold the pixels that users have, and every integer of sound noise."""

_MASK = 0xFFFFFFFF
_BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}


class NoiseSource(Protocol):
    """Adds noise to an image, sample by sample.

    Attributes:
        name: identifies the stream; recorded, because another stream gives other counts.
    """

    name: str

    def perturb(self, image: Tensor, out: Tensor, index: int, start: int) -> None:
        """Write ``out[j] = image + noise(seed, index, start + j)`` for every row j.

        Args:
            image: shape (...), on the device of ``out``.
            out: shape (m, ...), a slice of a preallocated buffer; what it held is overwritten.
            index: stable index of the input.
            start: index of the first sample.
        """


def too_coarse(dtype: torch.dtype) -> ParameterError:
    """Return the error for noise that would be added in a format below float32."""
    return ParameterError(
        f"Noise cannot be added in {str(dtype).removeprefix('torch.')}.",
        cause="the image would be rounded before its noise is added, so two images could become one, or a sum be rounded by a "
        "rule that shows the image; no radius holds.",
        fix="Add it in float32, and let the classifier cast what it is given.",
    )


class GaussianNoise:
    """Independent N(0, sigma^2) on every element.

    The order of the stream within a sample is that of channels-last memory for items of three dimensions, and that of contiguous
    memory otherwise, whatever the layout of ``out``: the layout decides the speed, never the noise.

    Args:
        sigma: standard deviation, > 0, in the units of the image.
        seed: any integer.
    """

    name = "gaussian-blocks-v1"

    def __init__(self, sigma: float, seed: int) -> None:
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ParameterError(f"sigma is {sigma!r}; expected a finite number above 0.")
        self.sigma, self.seed = float(sigma), int(seed)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._cached: tuple[tuple[Any, ...], Tensor] = ((), torch.empty(0))

    def perturb(self, image: Tensor, out: Tensor, index: int, start: int) -> None:
        """See :meth:`NoiseSource.perturb`."""
        rows = _stream_order(out)
        if rows.is_contiguous():
            self._fill(rows.view(len(out), -1), index, start)
            out.add_(image)
            return
        size = block_size(image)
        for first in range(0, len(out), size):
            part = rows[first : first + size]
            noise = torch.empty(part.shape, dtype=out.dtype, device=out.device)
            self._fill(noise.view(len(part), -1), index, start + first)
            torch.add(noise, _stream_order(image[None]), out=part)

    def _fill(self, rows: Tensor, index: int, start: int) -> None:
        """Write the noise of samples ``start`` onwards into contiguous rows, shape (m, elements)."""
        size = block_size(rows[0])
        row = 0
        while row < len(rows):
            block, offset = divmod(start + row, size)
            count = min(size - offset, len(rows) - row)
            target = rows[row : row + count]
            if count == size:
                self._draw(target, index, block)
            else:
                target.copy_(self._block(rows, index, block, size)[offset : offset + count])
            row += count

    def _block(self, rows: Tensor, index: int, block: int, size: int) -> Tensor:
        # Small batches walk through one block in several calls: keep the current one.
        key = (index, block, rows.shape[1], rows.dtype, rows.device)
        known, values = self._cached
        if known != key:
            if known[2:] != key[2:]:
                values = torch.empty(size, rows.shape[1], dtype=rows.dtype, device=rows.device)
            self._draw(values, index, block)
            self._cached = key, values
        return values

    def _draw(self, values: Tensor, index: int, block: int) -> None:
        generator = self._generators.get(values.device)
        if generator is None:
            generator = self._generators[values.device] = torch.Generator(values.device)
        generator.manual_seed(block_seed(self.seed, index, block))
        # One flat contiguous call: `normal_` is vectorised only then, and its stream depends on the number of elements.
        values.view(-1).normal_(0.0, self.sigma, generator=generator)


def block_size(item: Tensor) -> int:
    """Return how many samples of an item are drawn together: a power of two, a function of its size and kind of device alone.

    Example:
        >>> block_size(torch.zeros(3, 32, 32)), block_size(torch.zeros(64))
        (16, 1024)
    """
    elements = _BLOCK_ELEMENTS.get(item.device.type, 1 << 16)
    return 1 << min(10, max(0, (elements // max(1, item.numel())).bit_length() - 1))


def block_seed(seed: int, index: int, block: int) -> int:
    """Return the seed of one block, below 2^64.

    torch's CPU generator uses the lower 32 bits of its seed only. Two blocks of one input must never share them, or samples would
    repeat, so for a fixed (seed, index) the lower half is a bijection of the block number; the upper half is a hash of both.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=12).digest()
    upper, before, after = struct.unpack("<III", digest)
    return int(upper << 32 | (_mix(block + before & _MASK) ^ after))


def _mix(value: int) -> int:
    # The finaliser of MurmurHash3 (public domain): a bijection of 32 bits in which every bit moves every other.
    value = (value ^ value >> 16) * 0x85EBCA6B & _MASK
    value = (value ^ value >> 13) * 0xC2B2AE35 & _MASK
    return value ^ value >> 16


def _stream_order(batch: Tensor) -> Tensor:
    """View a batch of items, shape (m, ...), with the dimensions of an item in the order of the stream."""
    return batch.movedim(1, -1) if batch.dim() == 4 else batch
