"""Choices that change the speed and never the result: batch size and memory layout."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.machine import cache
from rsplugins.machine.device import device_name, is_out_of_memory
from rsplugins.machine.progress import step
from rsplugins.provenance import processor

_ABOUT_EQUAL = 0.97
CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024)
_MORE_ON_CUDA = (2048, 4096)
_SMALLEST = 32


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


def best_batch_size(
    forward: Callable[[Tensor], Tensor], make: Callable[[int], Tensor], *, key: Sequence[Any] = (), seconds: float = 1.5
) -> int:
    """Return the size of micro-batches with the largest throughput: measured once and kept, for this machine.

    Args:
        forward: the model as it will be run.
        make: makes a batch of so many rows.
        key: what the speed depends on, the machine apart; nothing is kept without.
        seconds: no candidate is begun that would pass this limit, but for the first.
    """
    where = (*key, _machine(make(1).device)) if key else ()
    known = cache.recall("batch-sizes", *where) if where else None
    if isinstance(known, int) and known > 0:
        return known
    with step("measuring batch sizes"):
        found = _measured(forward, make, seconds)
    if where:
        cache.keep(found, "batch-sizes", *where)
    return found


def _measured(forward: Callable[[Tensor], Tensor], make: Callable[[int], Tensor], seconds: float) -> int:
    begin = time.perf_counter()
    rates: dict[int, list[float]] = {}
    sizes = CANDIDATES + (_MORE_ON_CUDA if make(1).is_cuda else ())
    for size in sizes:
        fastest = max((rate for rate, *_ in rates.values()), default=0.0)
        if rates and time.perf_counter() - begin + 2 * size / fastest > seconds:
            break
        try:
            rates[size] = [measure(forward, make(size), 1)]
        except RuntimeError as error:
            if not is_out_of_memory(error) or not rates:
                raise
            break
        # Twice in a row, or by far: one slow measurement may be somebody else's doing.
        last = [rate for rate, *_ in rates.values()][-2:]
        if last[-1] < 0.5 * fastest or max(last) < 0.9 * fastest:
            break
    # What else runs on the machine comes and goes: the best few run in turns, and their medians count.
    finalists = sorted(rates, key=lambda size: -rates[size][0])[:3]
    for _ in range(3 if len(finalists) > 1 else 0):
        for size in finalists:
            rates[size].append(measure(forward, make(size), 1))
    medians = {size: statistics.median(rates[size]) for size in finalists}
    # Of about equal rates the smallest size, whose last batch has the fewest idle rows; but below some rows what the engine does
    # for a batch counts.
    about = [size for size in finalists if medians[size] >= _ABOUT_EQUAL * max(medians.values())]
    return min((size for size in about if size >= _SMALLEST), default=max(about))


def signature(function: Callable[[Tensor], Tensor]) -> str:
    """Return what the speed of a function depends on, its layers and the shapes of its weights; nothing where nobody knows."""
    if not isinstance(function, nn.Module):
        return ""
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in function.state_dict().items()]
    return hashlib.sha256(f"{function!r}{shapes}".encode()).hexdigest()


def _machine(device: torch.device) -> str:
    name = processor() if device.type == "cpu" else device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, torch {torch.__version__}"


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
