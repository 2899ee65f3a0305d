import math
from decimal import Decimal

import mpmath
import numpy as np
import pytest
from scipy import stats

from rsplugins.errors import ParameterError
from rsplugins.statistics import clopper_pearson_lower, radius_from_one_bound, radius_from_two_bounds, round_down, vote_radius

VOTES = [(n, k) for n in (100, 1000, 10_000, 100_000) for k in (n, n - 1, int(0.97 * n), int(0.7 * n))]
ALPHA = 0.001


def exact_quantile(p):
    return mpmath.sqrt(2) * mpmath.erfinv(2 * p - 1)


def exact_radius(k, n):
    """The radius in 40 digits: Newton on the binomial tail, summed term by term."""
    with mpmath.workdps(40):
        alpha = mpmath.mpf(ALPHA)
        if k == n:
            return exact_quantile(alpha ** (mpmath.mpf(1) / n))
        p = mpmath.mpf(float(clopper_pearson_lower(k, n, ALPHA)))
        for _ in range(2):
            term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
            slope, tail, j = term * k / p, mpmath.mpf(0), k
            while j <= n and term > mpmath.mpf(10) ** -35:
                tail, term, j = tail + term, term * (n - j) / (j + 1) * p / (1 - p), j + 1
            p -= (tail - alpha) / slope
        return exact_quantile(p)


def check_never_above(radius_of, cases):
    for n, k in cases:
        found, truth = radius_of(k, n), exact_radius(k, n)
        assert found <= truth, f"{found!r} is above {mpmath.nstr(truth, 20)} for {k} of {n} votes"
        assert found >= truth * (1 - mpmath.mpf(2e-9)), f"{found!r} gives away too much for {k} of {n} votes"


def test_radii_are_never_above_the_exact_value_and_hardly_below():
    check_never_above(lambda k, n: vote_radius(k, n, ALPHA, 1.0), VOTES)


def test_without_taking_off_the_slack_some_radii_are_above():
    with pytest.raises(AssertionError, match="is above"):
        check_never_above(lambda k, n: float(stats.norm.ppf(clopper_pearson_lower(k, n, ALPHA))), VOTES)


def test_a_bound_barely_above_one_half_gives_no_more_than_is_true():
    # Here a relative 1e-9 off the radius is less than the rounding of the bound itself.
    for excess in (1e-15, 3e-14, 1e-12, 1e-9):
        p = 0.5 + excess
        true_if_bound_is_off_by_rounding = exact_quantile(mpmath.mpf(p) - mpmath.mpf(5e-15))
        assert radius_from_one_bound(p, 1.0) <= max(true_if_bound_is_off_by_rounding, 0)


def test_one_bound():
    assert radius_from_one_bound(0.99, 0.5) == pytest.approx(0.5 * stats.norm.ppf(0.99), rel=2e-9)
    assert radius_from_one_bound(0.5, 0.5) == 0.0
    assert radius_from_one_bound(0.2, 0.5) == 0.0
    assert radius_from_one_bound(0.99, 0.5, divide_by=3.0) == pytest.approx(0.5 * stats.norm.ppf(0.99) / 3, rel=2e-9)
    assert math.isfinite(radius_from_one_bound(1.0, 1.0))


def test_two_bounds():
    expected = 0.25 * (stats.norm.ppf(0.4) - stats.norm.ppf(0.1))
    assert radius_from_two_bounds(0.4, 0.1, 0.5) == pytest.approx(expected, rel=1e-8)
    assert radius_from_two_bounds(0.4, 0.1, 0.5) < expected
    assert radius_from_two_bounds(0.9, 1 - 0.9, 0.5) == pytest.approx(radius_from_one_bound(0.9, 0.5), rel=1e-8)
    assert radius_from_two_bounds(0.3, 0.3, 0.5) == 0.0
    assert radius_from_two_bounds(0.3, 0.6, 0.5) == 0.0
    assert radius_from_two_bounds(0.0, 0.0, 0.5) == 0.0
    assert radius_from_two_bounds(0.9, 1.0, 0.5) == 0.0
    assert math.isfinite(radius_from_two_bounds(1.0, 0.0, 1.0))
    assert radius_from_two_bounds(0.4, 0.1, 0.5, divide_by=2) == pytest.approx(expected / 2, rel=1e-8)


@pytest.mark.parametrize("p", np.linspace(0.05, 0.95, 7))
def test_two_nearly_equal_bounds_do_not_gain_from_cancellation(p):
    for gap in (1e-13, 1e-12, 1e-10, 1e-7):
        top, other = p + gap, p
        truth = (exact_quantile(mpmath.mpf(top)) - exact_quantile(mpmath.mpf(other))) / 2
        assert 0 <= radius_from_two_bounds(top, other, 1.0) <= truth


def test_a_relative_billionth_is_taken_off_whatever_the_radius():
    for p in (0.5001, 0.6, 0.9, 0.999, 1 - 1e-6):
        assert radius_from_one_bound(p, 0.3) <= 0.3 * exact_quantile(mpmath.mpf(p)) * (1 - mpmath.mpf(0.99e-9))
        assert radius_from_two_bounds(p, 1 - p, 0.3) <= 0.3 * exact_quantile(mpmath.mpf(p)) * (1 - mpmath.mpf(0.99e-9))


def check_printing(printed):
    """Assert that a printed radius is never above the radius, over 12 common pairs of sigma and n."""
    risen = 0
    for sigma in (0.12, 0.25, 0.5, 1.0):
        for n in (1000, 10_000, 100_000):
            radius = vote_radius(n, n, ALPHA, sigma)
            risen += float(printed(radius)) > radius
    assert risen == 0, f"{risen} of 12 printed radii rose"


def test_printed_radii_never_rise_but_plain_formatting_raises_eight_of_twelve():
    check_printing(lambda radius: round_down(radius, 3))
    check_printing(lambda radius: round_down(radius, 6))
    with pytest.raises(AssertionError, match="8 of 12"):
        check_printing(lambda radius: f"{radius:.3f}")


def test_round_down_is_exact_in_decimals():
    cases = {(0.9999999, 3): "0.999", (0.3, 1): "0.3", (0.1 + 0.2, 3): "0.300", (2.5, 0): "2", (1e-7, 6): "0.000000"}
    cases |= {(0.0, 3): "0.000", (-0.0001, 3): "-0.001", (1e22, 1): "1" + "0" * 22 + ".0", (0.29, 2): "0.29"}
    for (value, digits), text in cases.items():
        assert round_down(value, digits) == text
    assert round_down(-0.0, 3) == "0.000"
    assert round_down(np.float64(0.5), 2) == "0.50"
    assert round_down(1e300, 6).startswith("1000")


def test_round_down_never_rises_loses_less_than_a_digit_and_is_idempotent():
    rng = np.random.default_rng(0)
    for value in [*rng.uniform(0, 4, 500), *np.round(rng.uniform(0, 4, 500), 3)]:
        for digits in (2, 3, 6):
            text = round_down(value, digits)
            assert float(text) <= value
            assert Decimal(repr(float(value))) - Decimal(text) < Decimal(1).scaleb(-digits)
            assert len(text.split(".")[1]) == digits
            assert round_down(float(text), digits) == text  # a file read and written again does not drift


def test_arguments_out_of_range_are_refused():
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ParameterError, match="probability"):
            radius_from_one_bound(p, 1.0)
        with pytest.raises(ParameterError, match="probability"):
            radius_from_two_bounds(0.9, p, 1.0)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        for p in (0.2, 0.9):
            with pytest.raises(ParameterError, match="sigma"):
                radius_from_one_bound(p, sigma)
            with pytest.raises(ParameterError, match="sigma"):
                radius_from_two_bounds(p, 0.5, sigma)
    with pytest.raises(ParameterError, match="divide_by"):
        radius_from_one_bound(0.9, 1.0, divide_by=0)
    for value, digits in ((math.nan, 3), (math.inf, 3), (1.0, -1)):
        with pytest.raises(ParameterError, match="print"):
            round_down(value, digits)
