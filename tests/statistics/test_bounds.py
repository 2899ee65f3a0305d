import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rsplugins.errors import ParameterError
from rsplugins.statistics import (
    betting_lower,
    betting_upper,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
)


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
@pytest.mark.parametrize(("k", "n"), [(1, 10), (9, 10), (60, 100), (9_990, 10_000), (51_000, 100_000), (99_999, 100_000)])
def test_clopper_pearson_is_the_exact_binomial_test_turned_around(k, n, alpha):
    # P(at least k votes | p = L) = alpha and P(at most k | p = U) = alpha define the two bounds.
    assert stats.binom.sf(k - 1, n, clopper_pearson_lower(k, n, alpha)) == pytest.approx(alpha, rel=1e-8)
    assert stats.binom.cdf(k, n, clopper_pearson_upper(k, n, alpha)) == pytest.approx(alpha, rel=1e-8)


def test_clopper_pearson_agrees_with_scipy_stats():
    for k, n in ((0, 7), (3, 7), (7, 7), (40, 90)):
        assert clopper_pearson_interval(k, n, 0.05) == pytest.approx(tuple(stats.binomtest(k, n).proportion_ci(0.95, "exact")))
        low = stats.binomtest(k, n, alternative="greater").proportion_ci(0.999, "exact").low
        assert clopper_pearson_lower(k, n, 0.001) == pytest.approx(low, abs=1e-12)


def test_clopper_pearson_edges_have_closed_forms():
    for n in (1, 2, 100, 100_000):
        assert clopper_pearson_lower(0, n, 0.001) == 0.0
        assert clopper_pearson_upper(n, n, 0.001) == 1.0
        assert clopper_pearson_lower(n, n, 0.001) == pytest.approx(0.001 ** (1 / n), rel=1e-15)
        assert clopper_pearson_upper(0, n, 0.001) == pytest.approx(-math.expm1(math.log(0.001) / n), rel=1e-9)


@pytest.mark.parametrize(("n", "cap"), [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_the_largest_radius_of_n_unanimous_votes(n, cap):
    assert stats.norm.ppf(clopper_pearson_lower(n, n, 0.001)) == pytest.approx(cap, abs=5e-5)


def test_clopper_pearson_is_vectorised():
    k, n = np.array([[0], [3], [7]]), np.array([7, 9])
    bounds = clopper_pearson_lower(k, n, 0.01)
    assert bounds.shape == (3, 2)
    assert bounds.dtype == np.float64
    for i in range(3):
        for j in range(2):
            assert bounds[i, j] == clopper_pearson_lower(int(k[i, 0]), int(n[j]), 0.01)
    assert isinstance(clopper_pearson_lower(3, 7, 0.01), float)
    low, high = clopper_pearson_interval(k, n, 0.01)
    assert np.all(low < k / n + 1e-12)
    assert np.all(high > k / n - 1e-12)


@pytest.mark.parametrize(("bound", "cap"), [("bernstein", 3.57), ("hoeffding", 2.52)])
def test_caps_of_the_bounds_for_scores(bound, cap):
    n = 100_000
    lower = empirical_bernstein_lower(n, n, n, 0.001) if bound == "bernstein" else hoeffding_lower(n, n, 0.001)
    assert stats.norm.ppf(lower) == pytest.approx(cap, abs=5e-3)


def test_bounds_for_scores_follow_their_formulas_on_real_scores():
    x = np.random.default_rng(0).beta(8, 2, size=1000)
    n, alpha = len(x), 0.01
    total, squares = float(x.sum()), float((x * x).sum())
    half = math.sqrt(math.log(1 / alpha) / (2 * n))
    assert hoeffding_lower(total, n, alpha) == pytest.approx(x.mean() - half, rel=1e-9)
    assert hoeffding_upper(total, n, alpha) == pytest.approx(x.mean() + half, rel=1e-9)
    width = math.sqrt(2 * np.var(x, ddof=1) * math.log(2 / alpha) / n) + 7 * math.log(2 / alpha) / (3 * (n - 1))
    assert empirical_bernstein_lower(total, squares, n, alpha) == pytest.approx(x.mean() - width, rel=1e-9)
    assert empirical_bernstein_upper(total, squares, n, alpha) == pytest.approx(x.mean() + width, rel=1e-9)


def test_bounds_for_scores_allow_for_the_rounding_of_the_sums():
    # Many scores whose float64 sum, one after the other, comes out above the exact sum.
    x = np.full(300_001, 0.7)
    running = float(np.add.accumulate(x)[-1])
    exact = float(Fraction(0.7) * len(x))
    assert running > exact
    ideal = Fraction(0.7) - Fraction(math.sqrt(math.log(1000) / (2 * len(x))))
    assert hoeffding_lower(running, len(x), 0.001) <= ideal
    squares = float(np.add.accumulate(x * x)[-1])
    tail = 7 * math.log(2000) / (3 * (len(x) - 1))
    assert empirical_bernstein_lower(running, squares, len(x), 0.001) <= 0.7 - tail  # the true variance is 0
    assert empirical_bernstein_lower(running, squares, len(x), 0.001) == pytest.approx(0.7 - tail, abs=1e-6)


def test_upper_bounds_mirror_lower_bounds():
    x = np.random.default_rng(1).beta(2, 5, size=400)
    y = 1 - x
    assert hoeffding_upper(x.sum(), 400, 0.01) == pytest.approx(1 - hoeffding_lower(y.sum(), 400, 0.01), abs=1e-9)
    mirrored = 1 - empirical_bernstein_lower(y.sum(), (y * y).sum(), 400, 0.01)
    assert empirical_bernstein_upper(x.sum(), (x * x).sum(), 400, 0.01) == pytest.approx(mirrored, abs=1e-9)
    assert betting_upper(x, 0.01) == pytest.approx(1 - betting_lower(y, 0.01), abs=1e-12)


def capital(x, m):
    """The betting capital against a mean of at most m, straight from its definition."""
    return np.mean([np.prod(1 + c / m * (x - m)) for c in 0.5 ** np.arange(12)])


def test_the_betting_bound_is_where_the_capital_reaches_one_over_alpha():
    x = np.random.default_rng(2).beta(6, 2, size=150)
    bound = betting_lower(x, 0.01)
    assert capital(x, bound) >= 100
    assert capital(x, bound + 1e-6) < 100
    assert 0.5 < bound < x.mean()
    # Unanimous ones: capital about m^-n / 12, with the whole stake.
    assert betting_lower([1.0], 0.001, counts=[1000]) == pytest.approx((0.001 / 12) ** (1 / 1000), abs=2e-3)


def test_the_capital_is_fair_so_the_betting_bound_is_valid():
    # Exhaustive: over all outcomes of 10 votes, the expected capital against the true mean is exactly 1.
    for p in (0.1, 0.5, 0.8):
        expected = sum(stats.binom.pmf(k, 10, p) * capital(np.repeat([0.0, 1.0], [10 - k, k]), p) for k in range(11))
        assert expected == pytest.approx(1.0, rel=1e-9)


def test_a_histogram_rounded_down_bounds_from_below():
    x = np.random.default_rng(3).beta(9, 1, size=2000)
    exact = betting_lower(x, 0.001)
    last = 0.0
    for bins in (4, 16, 256, 4096):
        down = np.floor(x * bins) / bins
        values, counts = np.unique(down, return_counts=True)
        bound = betting_lower(values, 0.001, counts=counts)
        assert bound == pytest.approx(betting_lower(down, 0.001), abs=1e-12)
        assert last <= bound <= exact
        last = bound
    assert last == pytest.approx(exact, abs=1e-3)
    up = np.ceil(x * 256) / 256
    assert betting_upper(up, 0.001) >= betting_upper(x, 0.001)


def test_order_and_empty_bins_play_no_part():
    values, counts = np.array([0.0, 0.2, 0.9, 1.0]), np.array([0, 30, 60, 10])
    bound = betting_lower(values, 0.01, counts=counts)
    assert bound == pytest.approx(betting_lower(values[::-1], 0.01, counts=counts[::-1]), abs=1e-12)
    assert bound == pytest.approx(betting_lower(values[1:], 0.01, counts=counts[1:]), abs=1e-12)
    assert betting_lower([0.0], 0.01, counts=[50]) == 0.0


def test_each_bound_is_where_the_docstring_says_it_is_best():
    n, alpha = 10_000, 0.001
    calm = np.random.default_rng(4).beta(600, 20, size=n)
    total, squares = calm.sum(), (calm * calm).sum()
    assert hoeffding_lower(total, n, alpha) < empirical_bernstein_lower(total, squares, n, alpha) < betting_lower(calm, alpha)
    wild = np.repeat([0.0, 1.0], [10, 20])
    assert empirical_bernstein_lower(20, 20, 30, alpha) < hoeffding_lower(20, 30, alpha) <= wild.mean()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2, math.nan])
def test_alpha_out_of_range_is_refused(alpha):
    calls = [
        lambda: clopper_pearson_lower(1, 2, alpha),
        lambda: clopper_pearson_interval(1, 2, alpha),
        lambda: hoeffding_lower(1, 2, alpha),
        lambda: empirical_bernstein_upper(1, 1, 2, alpha),
        lambda: betting_lower([0.5], alpha),
    ]
    for call in calls:
        with pytest.raises(ParameterError, match="alpha"):
            call()


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0), (1.5, 3), (math.nan, 3), ([1, 9], 5)])
def test_impossible_votes_are_refused(k, n):
    with pytest.raises(ParameterError, match="impossible"):
        clopper_pearson_lower(k, n, 0.01)
    with pytest.raises(ParameterError, match="impossible"):
        clopper_pearson_upper(k, n, 0.01)


def test_impossible_scores_are_refused():
    with pytest.raises(ParameterError, match="cannot come from"):
        hoeffding_lower(11.0, 10, 0.01)
    with pytest.raises(ParameterError, match="cannot come from"):
        empirical_bernstein_lower(5.0, 6.0, 10, 0.01)  # squares above the sum: some score was above 1
    with pytest.raises(ParameterError, match="cannot come from"):
        empirical_bernstein_lower(5.0, 1.0, 10, 0.01)  # below total^2 / n: against Cauchy and Schwarz
    with pytest.raises(ParameterError, match="at least 2"):
        empirical_bernstein_lower(1.0, 1.0, 1, 0.01)
    with pytest.raises(ParameterError, match="at least 1"):
        hoeffding_lower(0.0, 0, 0.01)
    for values, counts in (
        ([1.1], None),
        ([-0.1], None),
        ([], None),
        ([0.5], [1, 2]),
        ([0.5], [-1]),
        ([0.5], [0]),
        ([math.nan], None),
    ):
        with pytest.raises(ParameterError, match="betting"):
            betting_lower(values, 0.01, counts=counts)
