"""Choices that change the speed and never the result: batch size and memory layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rsplugins.machine.device import is_out_of_memory

_ABOUT_EQUAL = 0.97
CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024)
_MORE_ON_CUDA = (2048, 4096)


def prefers_channels_last(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function has 2-d convolutions, whose kernels are faster on channels-last memory, on CPUs by up to three times."""
    return isinstance(function, nn.Module) and any(isinstance(module, nn.Conv2d) for module in function.modules())


def empty_batch(rows: int, shape: Sequence[int], *, channels_last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros of shape (rows, *shape); ``channels_last`` counts for items of three dimensions only."""
    layout = torch.channels_last if channels_last and len(shape) == 3 else torch.contiguous_format
    return torch.zeros(rows, *shape, dtype=dtype, device=device).contiguous(memory_format=layout)


def measure(forward: Callable[[Tensor], Tensor], batch: Tensor, rounds: int = 2) -> float:
    """Return samples a second of a forward pass, the best of a few rounds after one to warm up."""
    best = float("inf")
    for _ in range(rounds + 1):
        synchronize(batch.device)
        start = time.perf_counter()
        forward(batch)
        synchronize(batch.device)
        best = min(best, time.perf_counter() - start)
    return len(batch) / best


def best_batch_size(forward: Callable[[Tensor], Tensor], make: Callable[[int], Tensor], seconds: float = 1.5) -> int:
    """Measure growing micro-batches until throughput falls, memory ends or time is up; return the fastest.

    Args:
        forward: the model as it will be run.
        make: makes a batch of so many rows.
        seconds: no candidate is begun that would pass this limit, but for the first.
    """
    begin = time.perf_counter()
    rates: dict[int, float] = {}
    sizes = CANDIDATES + (_MORE_ON_CUDA if make(1).is_cuda else ())
    for size in sizes:
        fastest = max(rates.values(), default=0.0)
        if rates and time.perf_counter() - begin + 3 * size / fastest > seconds:
            break
        try:
            rates[size] = measure(forward, make(size))
        except RuntimeError as error:
            if not is_out_of_memory(error) or not rates:
                raise
            break
        # Twice in a row, or by far: one slow measurement may be somebody else's doing.
        if rates[size] < 0.5 * fastest or max(list(rates.values())[-2:]) < 0.95 * fastest:
            break
    # The first measurements warm up the caches of the later ones: the best three run off against each other.
    finalists = sorted(rates, key=lambda size: -rates[size])[:3]
    for _ in range(2 if len(finalists) > 1 else 0):
        for size in finalists:
            rates[size] = max(rates[size], measure(forward, make(size)))
    finalists.sort(key=lambda size: -rates[size])
    # What the engine does for a micro-batch costs the same at any size: of about equal rates, the largest size.
    return max(size for size in finalists if rates[size] >= _ABOUT_EQUAL * rates[finalists[0]])


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
