"""The learning rate at any step, in closed form, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from rsplugins.training.recipe import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, progress: float, epochs: int) -> float:
    """Return the factor of the largest learning rate.

    Args:
        schedule: the recipe's.
        progress: epochs done, fractions included, in [0, epochs).
        epochs: length of the run.

    Example:
        >>> round(lr_factor(ScheduleSettings(name="cosine"), 5.0, 10), 6)
        0.5
    """
    warmup = schedule.warmup
    if warmup > 0 and progress < warmup:
        # Never 0: the first step of a run would do nothing.
        return max(progress, 1e-3 * warmup) / warmup
    if schedule.name == "multistep":
        return float(schedule.gamma ** sum(progress >= milestone for milestone in schedule.milestones))
    if schedule.name == "constant":
        return 1.0
    done = (progress - warmup) / max(epochs - warmup, 1e-9)
    return 1.0 - done if schedule.name == "onecycle" else 0.5 * (1.0 + math.cos(math.pi * done))
