"""The trainer's speed beside the forward-backward pass of the same model, precision, layout and batch, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.training.trainer import Trainer


@dataclass(frozen=True)
class Speed:
    """Images a second.

    Attributes:
        limit: forward and backward pass of the cross-entropy on one resident batch, nothing else.
        trainer: whole steps of the trainer: shuffling, augmentation, hooks, optimizer, averaging, sums.
        images: in an epoch.
    """

    limit: float
    trainer: float
    images: int

    @property
    def ratio(self) -> float:
        """The share of the limit that the trainer reaches."""
        return self.trainer / self.limit

    @property
    def epoch(self) -> float:
        """Seconds an epoch, without the measurements after it."""
        return self.images / self.trainer


def measure(trainer: Trainer, seconds: float = 10.0, rounds: int = 4) -> Speed:
    """Measure limit and trainer in turns, so that a change of the machine's load meets both; the best round of each counts.

    The trainer's weights change: measure one that is thrown away.

    Args:
        trainer: made from the recipe in question, before ``fit``.
        seconds: in all.
        rounds: turns.
    """
    engine, share = trainer.engine, seconds / (2 * rounds)
    # In the last epoch every burn-in, warmup and ramp is over: the most that a step costs.
    last = trainer.recipe.training.epochs - 1
    shares = trainer.shares(0)
    pixels, labels = trainer.train.take(shares[0])
    images, batch = engine.arranged(pixels), shares[0]

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from trainer.train.batches(shares, seed=0)

    batches = endless()

    def bare(step: int) -> None:
        engine.classifier.train()
        with engine.autocast():
            loss = F.cross_entropy(engine.forward(images).float(), labels)
        for parameter in engine.classifier.parameters():
            parameter.grad = None
        torch.autograd.backward(loss)

    def whole(step: int) -> None:
        engine.step(*next(batches), last, step % trainer.steps)

    for _ in range(3):  # compile, choose kernels
        bare(0)
        whole(0)
    limits, speeds = [], []
    for _ in range(rounds):
        limits.append(_rate(bare, share, trainer.device))
        speeds.append(_rate(whole, share, trainer.device))
    size = len(batch)
    return Speed(limit=max(limits) * size, trainer=max(speeds) * size, images=trainer.steps * size)


def _rate(step: Callable[[int], None], seconds: float, device: torch.device) -> float:
    """Return steps a second; the device is waited for every 20 steps, not after each."""
    _wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or done == 0:
        for _ in range(20 if device.type == "cuda" else 1):
            step(done)
            done += 1
        _wait(device)
    return done / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
