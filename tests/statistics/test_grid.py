"""The boundaries of sound sampling against 40 digits, and what the claim does with their error."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from rsplugins.errors import RunError
from rsplugins.statistics.claims import votes_claim
from rsplugins.statistics.grid import boundaries, total_variation


@pytest.mark.parametrize("sigma", [0.004, 0.12, 0.5])
def test_total_variation_is_a_bound(sigma):
    first, edges = boundaries(sigma)
    with mpmath.workdps(40):
        scale = mpmath.mpf(sigma) * 255
        error = mpmath.mpf(0)
        exact = [mpmath.ncdf((mpmath.mpf(first + 1 + at) - mpmath.mpf("0.5")) / scale) for at in range(len(edges))]
        for edge, p in zip(edges.tolist(), exact, strict=True):
            error += abs(mpmath.mpf(edge + 2**63) / mpmath.mpf(2) ** 64 - p)
        error += exact[0] + (1 - exact[-1])  # generous: the values outside are drawn with probability 0
    assert error < total_variation(sigma)
    assert total_variation(sigma) < 1e-11


def test_boundaries_rise_and_are_symmetric():
    _, edges = boundaries(0.25)
    assert (np.diff(edges.astype(object)) >= 0).all()
    both = edges.astype(object)
    assert (both + both[::-1] == 0).all()


VOTES = {"selection": {"1": 100}, "estimation": {"1": 9990, "0": 10}}
PARAMETERS = {"sigma": 0.25, "alpha": 0.001, "n0": 100, "n": 10_000}


def test_a_sound_claim_gives_up_the_variation_and_the_assumption():
    standard = votes_claim(VOTES, PARAMETERS)
    sound = votes_claim({**VOTES, "grid": {"levels": 255, "elements": 150_528}}, PARAMETERS)
    assert standard.assumptions == ("float-idealised",)
    assert not any("float-idealised" in text for text in sound.assumptions)
    assert standard.radius - 1e-6 < sound.radius < standard.radius
    huge = votes_claim({**VOTES, "grid": {"levels": 255, "elements": 10**15}}, PARAMETERS)
    assert huge.prediction is None


@pytest.mark.parametrize("grid", [{}, {"levels": 255}, {"levels": 255, "elements": 0}, {"levels": 16, "elements": 4}, 7])
def test_a_damaged_grid_is_a_damaged_run(grid):
    with pytest.raises(RunError, match="grid"):
        votes_claim({**VOTES, "grid": grid}, PARAMETERS)
