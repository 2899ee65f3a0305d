"""Range checks that every function of this room shares; each says what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rsplugins.errors import ParameterError


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return alpha as a float, or raise ParameterError unless 0 < alpha < 1."""
    if not 0.0 < alpha < 1.0:
        raise ParameterError(
            f"{name} = {alpha!r} is not a probability of error.",
            cause=f"{name} is the allowed chance of a false claim and must lie strictly between 0 and 1.",
            fix=f"Use {name}=0.001, the usual choice.",
        )
    return float(alpha)


def check_positive(value: float, name: str) -> float:
    """Return the value as a float, or raise ParameterError unless it is finite and > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ParameterError(f"{name} = {value!r} must be finite and greater than 0.", fix=f"Pass a positive number as {name}.")
    return float(value)


def check_trials(trials: int, at_least: int = 1, name: str = "n") -> int:
    """Return a number of samples as an int, or raise ParameterError when it is not an integer or too small."""
    if isinstance(trials, bool) or trials != int(trials) or trials < at_least:
        raise ParameterError(f"{name} = {trials!r} must be an integer of at least {at_least}.", fix="Draw more samples.")
    return int(trials)


def check_counts(successes: Any, trials: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both as float64 arrays, or raise ParameterError unless they are integers with 0 <= successes <= trials >= 1."""
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if not (np.all(k == np.floor(k)) and np.all(n == np.floor(n)) and np.all(k >= 0) and np.all(k <= n) and np.all(n >= 1)):
        raise ParameterError(
            f"{successes!r} successes of {trials!r} trials is impossible.",
            cause="Both must be integers with 0 <= successes <= trials and at least one trial.",
            fix="Check that the votes and the number of samples belong together.",
        )
    return k, n
