import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import ParameterError, RspluginsError, RunError
from rsplugins.statistics import empirical_bernstein_lower, sequence_lower, votes_claim
from rsplugins.statistics.claims import gaussian, gaussian_soft

PARAMETERS = {"sigma": 0.5, "alpha": 0.001, "n0": 100, "n": 10_000}
VOTES = {"selection": {"3": 97, "5": 3}, "estimation": {"3": 9_990, "5": 10}}


def expected_radius(k, n, alpha=0.001, sigma=0.5):
    return sigma * stats.norm.ppf(stats.beta.ppf(alpha, k, n - k + 1))


def test_votes_become_cohens_certificate():
    claim = gaussian(VOTES, PARAMETERS)
    assert claim.prediction == 3
    assert claim.radius == pytest.approx(expected_radius(9_990, 10_000), rel=2e-9)
    assert claim.radius < expected_radius(9_990, 10_000)
    assert (claim.guarantee, claim.norm, claim.alpha) == (Guarantee.PROBABILISTIC, Norm.L2, 0.001)
    assert claim.rule == "cohen-2019 theorem 1, clopper-pearson"
    assert claim.assumptions == ("float-idealised",)


def test_evidence_read_back_from_json_gives_the_same_claim():
    assert gaussian(json.loads(json.dumps(VOTES)), json.loads(json.dumps(PARAMETERS))) == gaussian(VOTES, PARAMETERS)


def test_rescoring_changes_only_alpha():
    radii = [gaussian(VOTES, PARAMETERS | {"alpha": alpha}).radius for alpha in (1e-6, 0.001, 0.01)]
    assert radii == sorted(radii)
    assert radii[2] == pytest.approx(expected_radius(9_990, 10_000, alpha=0.01), rel=2e-9)


def test_the_selection_votes_choose_and_never_count():
    # The class that wins the estimation but not the selection gets nothing.
    claim = gaussian({"selection": {"3": 60, "5": 40}, "estimation": {"5": 9_999, "3": 1}}, PARAMETERS)
    assert (claim.prediction, claim.radius) == (None, 0.0)
    tie = {"selection": {"7": 50, "2": 50}, "estimation": {"2": 9_000, "7": 1_000}}
    assert gaussian(tie, PARAMETERS).prediction == 2
    numeric = {"selection": {"10": 50, "9": 50}, "estimation": {"9": 9_000, "10": 1_000}}
    assert gaussian(numeric, PARAMETERS).prediction == 9  # the smaller number, although "10" < "9" as text


def test_abstains_exactly_when_the_bound_is_not_above_one_half():
    critical = int(stats.binom.isf(0.001, 10_000, 0.5)) + 1
    for k, prediction in ((critical, 3), (critical - 1, None)):
        claim = gaussian({"selection": {"3": 100}, "estimation": {"3": k, "5": 10_000 - k}}, PARAMETERS)
        assert claim.prediction == prediction
        assert (claim.radius > 0) == (prediction is not None)
    missing = gaussian({"selection": {"3": 100}, "estimation": {"5": 10_000}}, PARAMETERS)
    assert (missing.prediction, missing.radius, missing.alpha) == (None, 0.0, 0.001)


def test_early_stopping_uses_the_confidence_sequence():
    stopped = {"selection": {"3": 100}, "estimation": {"3": 480, "5": 20}}
    claim = gaussian(stopped, PARAMETERS | {"stop_at": [0.25]})
    assert claim.radius == pytest.approx(0.5 * stats.norm.ppf(sequence_lower(480, 500, 0.001)), rel=2e-9)
    assert claim.radius < expected_radius(480, 500)
    assert claim.rule == "cohen-2019 theorem 1, confidence sequence"
    with pytest.raises(RunError, match="500 estimation votes"):
        gaussian(stopped, PARAMETERS | {"stop_at": []})  # not stopped early, so votes are missing
    with pytest.raises(RunError, match="at most 400"):
        gaussian(stopped, PARAMETERS | {"stop_at": [0.25], "n": 400})


def test_a_factor_between_image_and_noise_divides_the_radius():
    claim = votes_claim(VOTES, PARAMETERS, divide_by=5.0, theorem="lemma of another plugin")
    assert claim.radius == pytest.approx(expected_radius(9_990, 10_000) / 5, rel=2e-9)
    assert claim.rule == "lemma of another plugin, clopper-pearson"


BROKEN = [
    {},
    {"selection": {"3": 100}},
    {"selection": {"3": 99}, "estimation": {"3": 10_000}},
    {"selection": {"3": 100}, "estimation": {"3": 10_001}},
    {"selection": {"3": 100}, "estimation": {"3": 9_999}},
    {"selection": {"3": 100}, "estimation": {"3": 10_010, "5": -10}},
    {"selection": {"3": 100}, "estimation": {"3": 9_999.5, "5": 0.5}},
    {"selection": {"3": True, "4": 99}, "estimation": {"3": 10_000}},
    {"selection": {"3": 100}, "estimation": {"3": "10000"}},
    {"selection": {"3": 100}, "estimation": {}},
    {"selection": {"3": 100}, "estimation": {"-1": 10_000}},
    {"selection": {"cat": 100}, "estimation": {"cat": 10_000}},
    {"selection": {"3": 50, "03": 50}, "estimation": {"3": 10_000}},
    {"selection": [100], "estimation": [10_000]},
    {"selection": None, "estimation": None},
]


@pytest.mark.parametrize("evidence", BROKEN, ids=range(len(BROKEN)))
def test_evidence_that_contradicts_itself_is_a_damaged_run(evidence):
    with pytest.raises(RunError) as caught:
        gaussian(evidence, PARAMETERS)
    assert caught.value.cause
    assert caught.value.fix


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"alpha": 1.0}, {"sigma": 0.0}, {"sigma": -1.0}])
def test_parameters_out_of_range_are_refused(change):
    for votes in (VOTES, {"selection": {"3": 100}, "estimation": {"5": 10_000}}):
        with pytest.raises(ParameterError):
            gaussian(votes, PARAMETERS | change)


def scores(classes=4, n=10_000, n0=100, sharpness=40.0, seed=0):
    """Evidence of soft scores that sum to 1: Dirichlet draws that favour class 1."""
    rng = np.random.default_rng(seed)
    weights = np.ones(classes)
    weights[1] = sharpness
    first, x = rng.dirichlet(weights, n0), rng.dirichlet(weights, n)
    table = {"sums": x.sum(axis=0), "squares": (x**2).sum(axis=0)}
    evidence = {
        "classes": classes,
        "selection": {"n": n0, "sums": {str(c): float(v) for c, v in enumerate(first.sum(axis=0))}},
        "estimation": {"n": n} | {name: {str(c): float(v) for c, v in enumerate(row)} for name, row in table.items()},
    }
    return evidence, x, weights / weights.sum()


def test_soft_claim_rests_on_the_bound_that_was_asked_for():
    evidence, x, means = scores()
    mean, var, n = x[:, 1].mean(), x[:, 1].var(ddof=1), len(x)
    logs = np.log(2 / 0.001)
    bernstein = mean - np.sqrt(2 * var * logs / n) - 7 * logs / (3 * (n - 1))
    hoeffding = mean - np.sqrt(np.log(1 / 0.001) / (2 * n))
    for bound, lower in (("empirical-bernstein", bernstein), ("hoeffding", hoeffding)):
        claim = gaussian_soft(evidence, PARAMETERS | {"bound": bound})
        assert claim.prediction == 1
        assert claim.radius == pytest.approx(0.5 * stats.norm.ppf(lower), rel=1e-6)
        assert claim.radius < 0.5 * stats.norm.ppf(means[1])  # the exact Dirichlet mean
        assert claim.rule == f"salman-2019 lemma 2, {bound}, runner-up complement"
    assert gaussian_soft(evidence, PARAMETERS).rule.count("empirical-bernstein") == 1


def test_bounding_every_class_certifies_below_one_half_and_spends_alpha_once():
    evidence, x, means = scores(sharpness=2.5)
    assert means[1] < 0.5
    assert gaussian_soft(evidence, PARAMETERS).prediction is None
    claim = gaussian_soft(evidence, PARAMETERS | {"runner_up": "bounded"})
    truth = 0.25 * (stats.norm.ppf(means[1]) - stats.norm.ppf(means[0]))
    assert 0.6 * truth < claim.radius < truth
    # alpha/K for each class: the radius of a bound at alpha itself would be larger.
    lower = empirical_bernstein_lower(x[:, 1].sum(), (x[:, 1] ** 2).sum(), len(x), 0.001 / 4)
    upper = max(
        1 - empirical_bernstein_lower((1 - x[:, c]).sum(), ((1 - x[:, c]) ** 2).sum(), len(x), 0.001 / 4) for c in (0, 2, 3)
    )
    assert claim.radius == pytest.approx(0.25 * (stats.norm.ppf(lower) - stats.norm.ppf(upper)), rel=1e-6)


def test_one_hot_scores_certify_less_than_their_votes():
    evidence = {"selection": {"n": 100, "sums": {"3": 97.0, "5": 3.0}}}
    evidence["estimation"] = {"n": 10_000, "sums": {"3": 9_990.0}, "squares": {"3": 9_990.0}}
    assert 0 < gaussian_soft(evidence, PARAMETERS).radius < gaussian(VOTES, PARAMETERS).radius


def test_soft_evidence_that_does_not_fit_is_refused():
    good, _, _ = scores()
    estimation = good["estimation"]

    def claim(changes, **parameters):
        return gaussian_soft(good | changes, PARAMETERS | parameters)

    for changes in (
        {"selection": {"n": 99, "sums": {"1": 50.0}}},
        {"selection": {"n": 100, "sums": {}}},
        {"selection": {"n": 100, "sums": {"2": 1.0}}, "estimation": {"n": 10_000, "sums": {"1": 1.0}, "squares": {"1": 1.0}}},
        {"estimation": estimation | {"n": 9_999}},
        {"estimation": estimation | {"sums": {"1": 20_000.0}}},
        {"estimation": estimation | {"sums": {"1": float("nan")}}},
        {"estimation": estimation | {"squares": {"1": 9_999.0}}},
        {"estimation": {"n": 10_000, "sums": estimation["sums"]}},
        {"estimation": None},
    ):
        with pytest.raises(RunError):
            claim(changes)
    for parameters in ({"bound": "clopper-pearson"}, {"runner_up": "guessed"}, {"bound": "betting"}):
        with pytest.raises(ParameterError, match="no soft claim"):
            claim({}, **parameters)
    fewer = estimation | {"sums": {"1": 9_000.0}, "squares": {"1": 8_500.0}}
    assert claim({"estimation": fewer}).prediction == 1  # the complement rule needs the one class only
    with pytest.raises(RunError, match="runner_up"):
        claim({"estimation": fewer}, runner_up="bounded")
    with pytest.raises(RunError, match="4 classes"):
        claim({"classes": None}, runner_up="bounded")


def test_scores_that_do_not_sum_to_one_refuse_the_complement_shortcut():
    # Max-reduced scores: two classes at 0.9 each. The complement rule would certify a class that is not even on top.
    table = {"0": 9_000.0, "1": 9_100.0}
    evidence = {"classes": 2, "selection": {"n": 100, "sums": {"0": 90.5, "1": 90.0}}}
    evidence["estimation"] = {"n": 10_000, "sums": table, "squares": {"0": 8_200.0, "1": 8_400.0}}
    with pytest.raises(RunError, match="more than 1 a sample"):
        gaussian_soft(evidence, PARAMETERS)
    assert gaussian_soft(evidence, PARAMETERS | {"runner_up": "bounded"}).prediction is None


def test_claims_import_no_torch_no_pydantic_and_no_scipy_stats():
    heavy = ("torch", "pydantic", "scipy.stats", "pandas", "matplotlib")
    program = f"import sys, rsplugins.statistics.claims; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_errors_of_this_room_are_the_package_s_own():
    assert issubclass(RunError, RspluginsError)
    assert issubclass(ParameterError, RspluginsError)
