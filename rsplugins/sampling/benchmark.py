"""How fast the engine is beside the bare forward pass, which is its limit, and beside the loop of the field's scripts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsplugins.execution import Execution
from rsplugins.sampling import Draw, GaussianNoise, IntegerNoise, Program, Sampler, tuning
from rsplugins.statistics.grid import LEVELS

USUAL_BATCH = 1000
"""Batch size of Cohen et al.'s certify.py and of most of its successors."""


@dataclass(frozen=True)
class Rate:
    """Samples a second of one way to run the model.

    Attributes:
        name: ``"bare, best"``, ``"bare, same batch"``, ``"engine"``, ``"engine, sound"`` or ``"usual loop"``.
        batch: rows of a forward pass.
        layout: ``"channels-last"`` or ``"contiguous"``.
        median, best: over the rounds.
    """

    name: str
    batch: int
    layout: str
    median: float
    best: float


@dataclass(frozen=True)
class Report:
    """One run of the benchmark: the rates, the medians of the ratios within a round, and where it was measured."""

    rates: tuple[Rate, ...]
    ratios: dict[str, float]
    setting: dict[str, Any]


def benchmark(
    model: nn.Module, item: Tensor, num_classes: int, execution: Execution, *, n: int = 1000, rounds: int = 5, sigma: float = 0.25
) -> Report:
    """Measure the ways to run a model, interleaved, so that what else the machine does weighs on all alike.

    Args:
        model: from images (B, C, H, W) to logits (B, K), in eval mode, on its device.
        item: one image, (C, H, W).
        num_classes: K.
        execution: dtype and batch size of the engine; the bare passes have the same dtype.
        n: samples of each way and round.
        rounds: how often each way is measured.
        sigma: of the noise.

    Returns:
        Rates, and ratios of the engine to the best bare pass, to the bare pass with its own batch and layout, and to the
        usual loop; and ``"sound / engine"``, the cost of sound sampling beside that of the standard sampler.
    """
    sampler = Sampler(model, GaussianNoise(sigma, execution.seed), num_classes, execution)
    item = item.to(sampler.device)
    _run_engine(sampler, item, 2 * USUAL_BATCH if execution.batch_size == "auto" else execution.batch_size)  # warm, and tuned
    own = (sampler.batch_size, sampler.channels_last)
    best = _best_bare(sampler, item, own)
    sound = Sampler(model, IntegerNoise(sigma, execution.seed), num_classes, replace(execution, batch_size=own[0]))
    on_grid = (item * LEVELS).round() / LEVELS
    ways: dict[str, tuple[tuple[int, bool], Callable[[], None]]] = {
        "bare, best": (best, lambda: _run_bare(sampler, item, n, *best)),
        "bare, same batch": (own, lambda: _run_bare(sampler, item, n, *own)),
        "engine": (own, lambda: _run_engine(sampler, item, n)),
        "engine, sound": (own, lambda: _run_engine(sound, on_grid, n)),
        "usual loop": ((USUAL_BATCH, False), lambda: _run_usual(sampler, item, n, sigma)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (_shape, way) in ways.items():
            seconds[name].append(_timed(way, sampler.device))
    rates = tuple(
        Rate(name, batch, _layout(last), n / statistics.median(seconds[name]), n / min(seconds[name]))
        for name, ((batch, last), _way) in ways.items()
    )
    others = {"bare, best": "engine / best bare", "bare, same batch": "engine / same bare", "usual loop": "engine / usual loop"}
    ratios = {
        label: statistics.median(other / engine for other, engine in zip(seconds[name], seconds["engine"], strict=True))
        for name, label in others.items()
    }
    ratios["sound / engine"] = statistics.median(
        sound / engine for sound, engine in zip(seconds["engine, sound"], seconds["engine"], strict=True)
    )
    return Report(rates, ratios, _setting(sampler, item, n, rounds))


def _best_bare(sampler: Sampler, item: Tensor, own: tuple[int, bool]) -> tuple[int, bool]:
    """Return the fastest (batch, channels-last) of a sweep, which includes what the engine chose."""
    rates: dict[tuple[int, bool], float] = {}
    layouts = (False, True) if item.dim() == 3 else (False,)
    for last in layouts:
        for size in sorted({16, 32, 64, 128, 256, own[0]}):
            batch = _inputs(sampler, item, size, last)
            rates[size, last] = tuning.measure(sampler._forward, batch, rounds=3)
            if rates[size, last] < 0.7 * max(rates.values()):
                break
    return max(rates, key=lambda key: rates[key])


def _inputs(sampler: Sampler, item: Tensor, rows: int, channels_last: bool) -> Tensor:
    empty = tuning.empty_batch(rows, item.shape, channels_last=channels_last, dtype=sampler.dtype, device=sampler.device)
    return empty.normal_().mul_(0.25).add_(item)


def _run_bare(sampler: Sampler, item: Tensor, n: int, batch: int, channels_last: bool) -> None:
    inputs = _inputs(sampler, item, batch, channels_last)
    for rows in _parts(n, batch):
        sampler._forward(inputs[:rows])


def _run_engine(sampler: Sampler, item: Tensor, n: int) -> None:
    def program() -> Program:
        tally = yield Draw(0, n)
        return tally.votes()

    for _ in sampler.run([(0, item, program())]):
        pass


def _run_usual(sampler: Sampler, item: Tensor, n: int, sigma: float) -> None:
    counts = np.zeros(sampler.num_classes or 0, dtype=int)
    for rows in _parts(n, USUAL_BATCH):
        batch = item.repeat((rows, *(1,) * item.dim()))
        predictions = sampler._forward(batch + torch.randn_like(batch) * sigma).argmax(1)
        for label in predictions.cpu().numpy():
            counts[label] += 1


def _parts(n: int, batch: int) -> Iterator[int]:
    for index in range(math.ceil(n / batch)):
        yield min(batch, n - index * batch)


def _timed(way: Callable[[], None], device: torch.device) -> float:
    tuning.synchronize(device)
    start = time.perf_counter()
    way()
    tuning.synchronize(device)
    return time.perf_counter() - start


def _layout(channels_last: bool) -> str:
    return "channels-last" if channels_last else "contiguous"


def _setting(sampler: Sampler, item: Tensor, n: int, rounds: int) -> dict[str, Any]:
    cuda = sampler.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(sampler.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": sampler.describe()["dtype"],
        "compile": sampler.execution.compile,
        "torch": torch.__version__,
        "input_size": list(item.shape),
        "num_classes": sampler.num_classes,
        "samples": n,
        "rounds": rounds,
        "reevaluated": sampler.reevaluated,
    }
