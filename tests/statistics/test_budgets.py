import math

import pytest
from scipy import stats

from rsplugins.errors import ImpossibleBudgetError, ParameterError, UsageError
from rsplugins.statistics import bonferroni, check_budget, largest_radius, smallest_n
from rsplugins.statistics.budgets import USEFUL_RADIUS

BOUNDS = ["clopper-pearson", "sequence", "hoeffding", "empirical-bernstein", "betting"]


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
@pytest.mark.parametrize("radius", [0.0025, 0.1, 0.5, 0.9])
def test_smallest_n_of_clopper_pearson_has_a_closed_form(alpha, radius):
    expected = math.ceil(math.log(alpha) / stats.norm.logcdf(radius / 0.25))
    assert smallest_n(radius, sigma=0.25, alpha=alpha) == expected


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("radius", [None, 0.0, 0.3, 0.6])
def test_the_smallest_n_reaches_the_radius_and_one_less_does_not(bound, radius):
    options = {"sigma": 0.25, "alpha": 0.001, "bound": bound}
    goal = USEFUL_RADIUS * 0.25 if radius is None else max(radius, 1e-300)
    n = smallest_n(radius, **options)
    assert largest_radius(n, **options) >= goal
    assert n == 1 or largest_radius(n - 1, **options) < goal


def test_tighter_bounds_need_fewer_samples():
    needed = {bound: smallest_n(0.5, sigma=0.25, alpha=0.001, bound=bound) for bound in BOUNDS}
    assert needed["clopper-pearson"] == min(needed.values())
    assert needed["betting"] < needed["empirical-bernstein"] < needed["hoeffding"]


def test_an_operator_norm_raises_the_budget():
    assert smallest_n(0.5, sigma=1.0, alpha=0.001, divide_by=2.0) == smallest_n(1.0, sigma=1.0, alpha=0.001)
    assert smallest_n(sigma=1.0, alpha=0.001, divide_by=2.0) == smallest_n(sigma=1.0, alpha=0.001) == 11


def test_ten_samples_at_one_in_a_thousand_are_refused_with_the_smallest_n():
    with pytest.raises(ImpossibleBudgetError) as caught:
        check_budget(10, sigma=0.25, alpha=0.001)
    error = caught.value
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert "n = 10" in error.what
    assert "alpha = 0.001" in error.what
    assert "smallest n that could is 11" in error.what
    assert "0.0029 sigma, below 0.0100 sigma" in error.cause
    assert "11" in error.fix
    check_budget(11, sigma=0.25, alpha=0.001)


def test_a_budget_can_be_asked_for_a_radius_and_for_each_bound():
    check_budget(100, sigma=0.25, alpha=0.001, radius=0.37)
    with pytest.raises(ImpossibleBudgetError, match=r"smallest n that could is 5114"):
        check_budget(100, sigma=0.25, alpha=0.001, radius=0.75)
    for bound in BOUNDS:
        n = smallest_n(sigma=0.25, alpha=0.001, bound=bound)
        check_budget(n, sigma=0.25, alpha=0.001, bound=bound)
        with pytest.raises(ImpossibleBudgetError, match=f"is {n}"):
            check_budget(n - 1, sigma=0.25, alpha=0.001, bound=bound)


def test_a_radius_beyond_any_budget_says_so():
    with pytest.raises(ImpossibleBudgetError, match="larger sigma"):
        smallest_n(10.0, sigma=0.25, alpha=0.001)


def test_bonferroni_shares_alpha():
    assert bonferroni(0.001) == 0.001
    assert bonferroni(0.001, classes=10) == pytest.approx(1e-4, rel=1e-12)
    assert bonferroni(0.06, classes=3, looks=4, inputs=5) == pytest.approx(0.001, rel=1e-12)
    for bad in ({"classes": 0}, {"looks": -1}, {"inputs": 1.5}, {"inputs": True}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            bonferroni(0.001, **bad)
    with pytest.raises(ParameterError, match="alpha"):
        bonferroni(1.5, classes=10)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ParameterError, match="no bound named 'wilson'"):
        largest_radius(100, sigma=0.25, alpha=0.001, bound="wilson")
    with pytest.raises(ParameterError, match="sigma"):
        smallest_n(sigma=0.0, alpha=0.001)
    with pytest.raises(ParameterError, match="radius"):
        smallest_n(-1.0, sigma=0.25, alpha=0.001)
    with pytest.raises(ParameterError, match="n = 0"):
        check_budget(0, sigma=0.25, alpha=0.001)
