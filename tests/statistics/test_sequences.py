import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from rsplugins.errors import ParameterError
from rsplugins.statistics import (
    clopper_pearson_lower,
    decide,
    decide_all,
    looks,
    sequence_lower,
    sequence_upper,
    sequences,
    vote_radius,
)
from rsplugins.statistics.radii import radius_from_one_bound

OPTIONS = {"sigma": 0.5, "alpha": 0.001, "n": 100_000}


def capital(k, t, q):
    """The mixture martingale by numerical integration of its definition, nothing shared with the closed form."""
    k, t, q = int(k), int(t), mpmath.mpf(float(q))
    knots = [0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.6, 1]
    return mpmath.quad(lambda c: (1 - c + c / q) ** k * (1 - c) ** (t - k), knots)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize(("k", "t"), [(1, 1), (1, 30), (10, 10), (55, 100), (99, 100), (1000, 1000), (700, 1000), (2, 1000)])
def test_the_bound_is_where_the_capital_reaches_one_over_alpha(k, t, alpha):
    bound = sequence_lower(k, t, alpha)
    assert capital(k, t, bound) >= 1 / alpha
    assert capital(k, t, bound * (1 + 1e-7)) < 1 / alpha


def test_the_capital_is_fair_at_the_truth_and_falls_above_it():
    # Exhaustive over all outcomes: expectation exactly 1 when q is the true probability, below 1 when q is above.
    for q in (0.2, 0.5, 0.9):
        values = [float(capital(k, 12, q)) for k in range(13)]
        for p, expected in ((q, 1.0), (0.8 * q, None)):
            mean = sum(stats.binom.pmf(k, 12, p) * values[k] for k in range(13))
            assert mean == pytest.approx(expected, rel=1e-9) if expected else mean < 1


def test_capital_is_a_martingale_step_by_step():
    q = 0.7
    for k, t in ((3, 5), (0, 4), (40, 50)):
        forward = q * capital(k + 1, t + 1, q) + (1 - q) * capital(k, t + 1, q)
        assert float(forward) == pytest.approx(float(capital(k, t, q)), rel=1e-9)


def test_any_vote_pattern_has_a_finite_bound_below_clopper_pearson():
    # Valid at every look cannot be tighter than the exact bound at one look.
    t = np.unique(np.geomspace(1, 10**7, 40).astype(int))
    k = np.unique(np.concatenate([np.linspace(0, 1, 41), [0.001, 0.999, 1 - 1e-6]]))
    votes = np.floor(k[:, None] * t)
    for alpha in (0.05, 0.001, 1e-9):
        lower = sequence_lower(votes, t, alpha)
        assert np.all(np.isfinite(lower))
        assert np.all(lower <= clopper_pearson_lower(votes, t, alpha))
        assert np.all((lower == 0) == (votes == 0))
        assert np.all(np.diff(sequence_lower(np.arange(200), 199, alpha)) > 0)
    assert float(sequence_lower(10**7, 10**7, 0.001)) > 1 - 1e-5


def test_scalar_and_array_agree_and_upper_mirrors_lower():
    votes = np.array([1, 50, 99, 100])
    array = sequence_lower(votes, 100, 0.01)
    assert array.shape == (4,)
    for i, k in enumerate(votes):
        assert sequence_lower(int(k), 100, 0.01) == pytest.approx(array[i], rel=1e-11)
        assert sequence_upper(int(k), 100, 0.01) == pytest.approx(1 - sequence_lower(100 - int(k), 100, 0.01), abs=1e-15)
    assert sequence_upper(100, 100, 0.01) == 1.0
    assert sequence_lower(0, 100, 0.01) == 0.0


def test_sequence_narrows_to_the_truth():
    widths = [sequence_upper(int(0.8 * t), t, 0.01) - sequence_lower(int(0.8 * t), t, 0.01) for t in (100, 10_000, 1_000_000)]
    assert widths[0] > 5 * widths[1] > 25 * widths[2]


def test_looks_are_geometric_and_end_at_n():
    for n in (1, 31, 32, 33, 1000, 100_000, 10**6):
        schedule = looks(n)
        assert schedule[-1] == n
        assert all(a < b for a, b in itertools.pairwise(schedule))
        assert all(b <= math.ceil(1.25 * a) for a, b in itertools.pairwise(schedule))
        assert len(schedule) <= 2 + math.log(max(n, 32) / 32, 1.25)
    assert looks(100, first=10, growth=2) == (10, 20, 40, 80, 100)
    for bad in ({"n": 0}, {"n": 10, "first": 0}, {"n": 10, "growth": 1.0}):
        with pytest.raises(ParameterError):
            looks(**bad)


def test_at_least_is_said_exactly_when_the_claim_reaches_the_radius():
    for k, t in ((100, 100), (970, 1000), (9_000, 10_000), (40, 100)):
        radius = vote_radius(k, t, 0.001, 0.5, sequence=True)
        if radius > 0:
            assert decide(k, t, radius, **OPTIONS) == "at-least"
            assert decide(k, t, np.nextafter(radius, 1), **OPTIONS) != "at-least"
        assert decide(k, t, 0.0, **OPTIONS) == ("at-least" if radius > 0 else decide(k, t, 1e-9, **OPTIONS))


def test_not_is_said_on_evidence_or_when_out_of_reach():
    assert decide(50, 100, 0.5, **OPTIONS) == "not"  # votes far below Phi(1)
    assert decide(84, 100, 0.5, **OPTIONS) is None  # just at it
    assert decide(32, 32, 3.0, **OPTIONS) == "not"  # six sigma: no 100,000 samples reach it
    assert decide(32, 32, 1.8, **OPTIONS) is None  # reachable, if all the rest agree
    assert decide(32, 32, 1.8, sigma=0.5, alpha=0.001, n=100) == "not"  # but not with 100
    assert decide(100, 100, 0.3, divide_by=10.0, **OPTIONS) == "not"
    assert decide(0, 40, 0.0, **OPTIONS) == "not"


def test_every_radius_is_decided_by_the_last_look():
    for k in (0, 500, 690, 900, 999, 1000):
        assert decide_all(k, 1000, [0.0, 0.1, 0.25, 0.5, 1.0], sigma=0.5, alpha=0.001, n=1000)
    assert not decide_all(84, 100, [0.1, 0.5], **OPTIONS)


@pytest.mark.parametrize(("successes", "trials", "n"), [(95, 100, 400), (60, 100, 130), (4_890, 5_000, 100_000), (30, 32, 1_000)])
def test_the_chance_of_reaching_a_radius_is_that_of_the_beta_binomial_law(successes, trials, n):
    left = n - trials
    for needed in range(0, left + 1, max(1, left // 50)):
        exact = stats.betabinom.sf(needed - 1, left, successes + 1, trials - successes)
        assert sequences._chance_of_votes(needed, left, successes, trials) == pytest.approx(exact, abs=0.02)


def test_votes_needed_are_the_fewest_that_certify():
    for radius, n in ((0.25, 500), (0.5, 1000), (1.0, 1000), (3.0, 100)):
        reached = [radius_from_one_bound(float(sequence_lower(k, n, 0.001)), 0.5) for k in range(n + 1)]
        expected = next((k for k, found in enumerate(reached) if found > 0 and found >= radius), n + 1)
        assert sequences._votes_needed(n, radius, 0.5, 0.001, 1.0) == expected


def stops(p, radius, n, seed, **options):
    """Return the samples that an input of this truth takes, and what is decided."""
    rng, k, t = np.random.default_rng(seed), 0, 0
    for look in looks(n):
        k, t = k + int(rng.binomial(look - t, p)), look
        decision = decide(k, t, radius, sigma=0.5, alpha=0.001, n=n, **options)
        if decision is not None:
            return t, decision
    raise AssertionError("undecided at n")


def test_what_n_samples_would_certify_is_hardly_ever_given_up():
    # A share that n samples certify nine times in ten, give or take.
    n, radius = 10_000, 0.5
    p = sequences._votes_needed(n, radius, 0.5, 0.001, 1.0) / n + 1.3 * math.sqrt(0.16 * 0.84 / n)
    with_futility = [stops(p, radius, n, seed)[1] for seed in range(400)].count("at-least")
    without = [stops(p, radius, n, seed, futility=0.0)[1] for seed in range(400)].count("at-least")
    assert 320 <= without <= 390
    assert without - 20 <= with_futility <= without


def test_a_share_that_n_samples_cannot_tell_from_the_radius_does_not_take_all_of_them():
    # A little above what the radius needs: no upper bound ever excludes it, and no lower one ever shows it.
    p = stats.norm.cdf(1.0) + 0.002
    found = [stops(p, 0.5, 10_000, seed) for seed in range(40)]
    assert {decision for _, decision in found} == {"not"}
    assert np.mean([t for t, _ in found]) < 5_000 < np.mean([stops(p, 0.5, 10_000, seed, futility=0.0)[0] for seed in range(40)])


def test_deciding_takes_far_fewer_samples_than_a_fixed_n():
    # A confident input: 99.9 % of the votes, radius asked for 1 sigma.
    stopped = next(t for t in looks(100_000) if decide(round(0.999 * t), t, 0.5, **OPTIONS) == "at-least")
    assert stopped <= 100_000 / 69


def test_impossible_arguments_are_refused():
    for k, t in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ParameterError, match="impossible"):
            sequence_lower(k, t, 0.01)
    with pytest.raises(ParameterError, match="alpha"):
        sequence_upper(1, 2, 1.0)
    for radius, trials in ((-0.1, 100), (math.nan, 100), (0.1, 100_001)):
        with pytest.raises(ParameterError, match="decide"):
            decide(50, trials, radius, **OPTIONS)
