"""Memory and sample plans, before anything is run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rsplugins.errors import ParameterError
from rsplugins.moments.memory import choose, estimate
from rsplugins.moments.sample_plan import expected_radius, samples_needed

PLAN = {"sigma": 0.25, "alpha": 0.001, "n": 100_000, "n_min": 500, "tolerance": 0.05}


def test_expected_radius_is_close_to_the_average_over_votes():
    rng = np.random.default_rng(0)
    for failure in (0.3, 0.05, 1e-3):
        for n in (1000, 20_000):
            votes = n - rng.binomial(n, failure, size=4000)
            radii = 0.25 * stats.norm.ppf(stats.beta.ppf(0.001, votes, n - votes + 1))
            assert expected_radius(math.log(failure), n, 0.25, 0.001) == pytest.approx(radii.mean(), abs=0.01)


@pytest.mark.parametrize("failure", [0.4, 0.2, 0.05, 1e-2, 1e-3, 1e-5, 1e-12])
def test_the_plan_keeps_its_tolerance_and_no_smaller_number_would(failure):
    n = samples_needed(math.log(failure), doubt=0.0, **PLAN)
    best = expected_radius(math.log(failure), 100_000, 0.25, 0.001)
    assert 500 <= n <= 100_000
    assert best - expected_radius(math.log(failure), n, 0.25, 0.001) <= 0.05 + 1e-9 or best <= 0.05
    if n > 500:
        assert best - expected_radius(math.log(failure), n - 1, 0.25, 0.001) > 0.05 - 1e-6


def test_doubt_never_takes_fewer_samples_and_certainty_not_the_most():
    for failure in (0.3, 0.01, 1e-4):
        assert samples_needed(math.log(failure), **PLAN) >= samples_needed(math.log(failure), doubt=0.0, **PLAN)
    assert samples_needed(-1e9, **PLAN) < 50_000
    assert samples_needed(0.0, **PLAN) == samples_needed(math.log(0.7), **PLAN) == 500


SIZES = [(3072, 16384), (16384, 4096), (4096, 10)]


def test_what_does_not_fit_says_what_it_needs_and_what_fits():
    needs = estimate(SIZES, 3072, rank=64)
    assert needs["full"] > 8 * 6 * 16384**2
    with pytest.raises(ParameterError, match=r"'full' needs about 12\.\d GiB .* limit is 2 GiB") as error:
        choose(needs, "full", 2 * 2**30)
    assert "representation='low-rank'" in error.value.fix
    with pytest.raises(ParameterError, match="Raise memory_gib"):
        choose(needs, "channel", 1000)


def test_auto_takes_full_for_small_networks_only():
    assert choose(estimate([(64, 100), (100, 10)], 64, rank=64), "auto", 2 * 2**30) == "full"
    assert choose(estimate(SIZES, 3072, rank=64), "auto", 2 * 2**30) == "low-rank"
    assert choose(estimate(SIZES, 3072, rank=64), "auto", 4 * 2**20) == "channel"
    assert choose(estimate(SIZES, 3072, rank=64), "published", 2 * 2**30) == "published"
