"""False certificates over more than 20,000 half-space classifiers per bound, and mistakes that the same check must catch."""

import numpy as np
import pytest
from scipy import stats

from rsplugins.statistics import (
    betting_lower,
    bonferroni,
    clopper_pearson_lower,
    clopper_pearson_upper,
    decide_all,
    empirical_bernstein_lower,
    hoeffding_lower,
    looks,
    radius_from_one_bound,
    radius_from_two_bounds,
    sequence_lower,
    sequence_upper,
    vote_radius,
)
from rsplugins.statistics.claims import gaussian, gaussian_soft
from tests.statistics.half_spaces import (
    SIGMA,
    World,
    bound_at_looks,
    check_false_rate,
    or_abstain,
    select,
    tabulate,
    votes_for,
    worlds,
)

MANY = 300  # repeats a world; 72 worlds make 21,600 classifiers


def from_bound(bound):
    """A certify function from a lower bound of votes (k, n, alpha) -> p_lower, on fresh estimation votes."""

    def certify(world, rng):
        chosen = select(world, rng)
        votes = votes_for(world, chosen, world.n, rng)
        return or_abstain(chosen, tabulate(lambda k: radius_from_one_bound(float(bound(k, world.n, world.alpha)), SIGMA), votes))

    return certify


def by_claim(world, rng):
    """The claim function itself, through evidence."""
    parameters = {"sigma": SIGMA, "alpha": world.alpha, "n0": world.n0, "n": world.n}
    predictions, radii = [], []
    for _ in range(world.repeats):
        evidence = {
            "selection": {str(c): int(v) for c, v in enumerate(rng.multinomial(world.n0, world.probabilities))},
            "estimation": {str(c): int(v) for c, v in enumerate(rng.multinomial(world.n, world.probabilities))},
        }
        claim = gaussian(evidence, parameters)
        predictions.append(-1 if claim.prediction is None else claim.prediction)
        radii.append(claim.radius)
    return np.array(predictions), np.array(radii)


def bonferroni_over_classes(world, rng):
    """Two bounds, every class at alpha/K, the top class taken from the same votes: valid because all bounds hold at once."""
    votes = rng.multinomial(world.n, world.probabilities, size=world.repeats)
    share = bonferroni(world.alpha, classes=world.classes)
    rows = np.arange(world.repeats)
    chosen = votes.argmax(axis=1)
    lower = clopper_pearson_lower(votes, world.n, share)[rows, chosen]
    upper = clopper_pearson_upper(votes, world.n, share)
    upper[rows, chosen] = 0.0
    radii = [radius_from_two_bounds(float(a), float(b), SIGMA) for a, b in zip(lower, upper.max(axis=1), strict=True)]
    return or_abstain(chosen, np.array(radii))


def peeking(bound, schedule):
    """Stop at the first look whose radius beats what is true: the worst a stopping rule can do, whatever radius it waits for."""

    def certify(world, rng):
        chosen = select(world, rng)
        goal = np.nextafter(world.true_radii()[chosen], np.inf)
        totals = np.array(schedule(world.n))
        steps = rng.binomial(np.diff(totals, prepend=0), world.probabilities[chosen][:, None])
        lowers = bound_at_looks(bound, np.cumsum(steps, axis=1), totals, world.alpha)
        best = np.array(
            [radius_from_one_bound(float(p), SIGMA) for p in lowers.max(axis=1)]
        )  # the goal is met somewhere or nowhere
        return or_abstain(chosen, np.where(best >= goal, best, 0.0))

    return certify


def every_hundredth(n):
    return range(max(1, n // 100), n + 1, max(1, n // 100))


def spread_over_looks(successes, trials, alpha):
    return clopper_pearson_lower(successes, trials, bonferroni(alpha, looks=100))  # every_hundredth looks at most a hundred times


BOUNDS = {
    "clopper-pearson": from_bound(clopper_pearson_lower),
    "hoeffding": from_bound(hoeffding_lower),
    "empirical-bernstein": from_bound(lambda k, n, alpha: empirical_bernstein_lower(k, k, n, alpha)),
    "betting": from_bound(lambda k, n, alpha: betting_lower([0.0, 1.0], alpha, counts=[n - k, k])),
    "sequence, one look": from_bound(sequence_lower),
    "sequence, stopped at will": peeking(sequence_lower, looks),
    "bonferroni over classes": bonferroni_over_classes,
    "bonferroni over looks": peeking(spread_over_looks, every_hundredth),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_false_certificates_stay_at_or_below_alpha(name):
    chosen = list(worlds(MANY))
    assert sum(world.repeats for world in chosen) >= 20_000
    check_false_rate(BOUNDS[name], chosen)


def test_the_claim_function_itself_stays_at_or_below_alpha():
    chosen = list(worlds(280))
    assert sum(world.repeats for world in chosen) >= 20_000
    check_false_rate(by_claim, chosen)


def test_the_sequence_survives_a_hundred_looks():
    chosen = list(worlds(900, ns=(500,)))
    assert sum(world.repeats for world in chosen) >= 20_000
    check_false_rate(peeking(sequence_lower, every_hundredth), chosen)
    with pytest.raises(AssertionError, match="false"):
        check_false_rate(peeking(clopper_pearson_lower, every_hundredth), chosen)


def test_bonferroni_over_inputs_bounds_the_chance_of_any_false_certificate_in_a_data_set():
    inputs, alpha = 50, 0.05
    world = World(0.5, 2, 1.0, 500, bonferroni(alpha, inputs=inputs), inputs * 2000)
    predictions, radii = BOUNDS["clopper-pearson"](world, np.random.default_rng(1))
    spoilt = ((predictions == 1) | (radii > 0)).reshape(2000, inputs).any(axis=1).sum()
    assert spoilt <= stats.binom.ppf(0.999, 2000, alpha)
    # Without it nearly every data set would hold a false one, so the bound above is no accident.
    world = World(0.5, 2, 1.0, 500, alpha, inputs * 200)
    predictions, radii = BOUNDS["clopper-pearson"](world, np.random.default_rng(1))
    assert ((predictions == 1) | (radii > 0)).reshape(200, inputs).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("kind", ["hoeffding", "empirical-bernstein", "betting"])
def test_soft_scores_of_half_spaces(kind):
    # Class 0 scores `high` on its half-space and `low` beyond; G(r) = low + (high - low) Phi(d - r) falls to 1/2 at r = d - knee.
    rng, repeats, classifiers = np.random.default_rng(2), 300, 0
    false = {0.05: 0, 0.01: 0, 0.001: 0}
    for alpha in false:
        for n in (100, 1000, 5000):
            for low, high in ((0.0, 1.0), (0.3, 0.8), (0.45, 0.65)):
                for over in (0.0, 0.2, 1.0):
                    knee = (0.5 - low) / (high - low)
                    p = float(stats.norm.cdf(stats.norm.ppf(knee) + over))
                    hits = rng.binomial(n, p, size=repeats)

                    def radius(k, n=n, low=low, high=high, alpha=alpha):
                        total, squares = low * (n - k) + high * k, low**2 * (n - k) + high**2 * k
                        if kind == "betting":
                            bound = betting_lower([low, high], alpha, counts=[n - k, k])
                        elif kind == "hoeffding":
                            bound = hoeffding_lower(total, n, alpha)
                        else:
                            bound = empirical_bernstein_lower(total, squares, n, alpha)
                        return radius_from_one_bound(bound, 1.0)

                    false[alpha] += int((tabulate(radius, hits) > over).sum())
                    classifiers += repeats
    assert classifiers >= 20_000
    for alpha, found in false.items():
        assert found <= stats.binom.ppf(0.999, classifiers // 3, alpha)


def test_soft_claims_with_every_class_bounded():
    def certify(world, rng):
        parameters = {"sigma": SIGMA, "alpha": world.alpha, "n0": world.n0, "n": world.n, "runner_up": "bounded"}
        claims = []
        for _ in range(world.repeats):
            sums = {str(c): float(v) for c, v in enumerate(rng.multinomial(world.n, world.probabilities))}
            selection = {str(c): float(v) for c, v in enumerate(rng.multinomial(world.n0, world.probabilities))}
            evidence = {
                "classes": world.classes,
                "selection": {"n": world.n0, "sums": selection},
                "estimation": {"n": world.n, "sums": sums, "squares": sums},
            }
            claims.append(gaussian_soft(evidence, parameters))
        predictions = [-1 if claim.prediction is None else claim.prediction for claim in claims]
        return np.array(predictions), np.array([claim.radius for claim in claims])

    check_false_rate(certify, list(worlds(30)))


def test_both_sides_of_the_sequence_hold_at_every_look():
    rng, alpha, repeats = np.random.default_rng(3), 0.05, 2000
    for p in (0.02, 0.5, 0.9):
        totals = np.arange(1, 400)
        votes = np.cumsum(rng.random((repeats, len(totals))) < p, axis=1)
        limit = stats.binom.ppf(0.999, repeats, alpha)
        above = (bound_at_looks(sequence_lower, votes, totals, alpha) > p).any(axis=1).sum()
        below = (bound_at_looks(sequence_upper, votes, totals, alpha) < p).any(axis=1).sum()
        assert max(above, below) <= limit
        assert above + below > 0  # the sequence is not so wide that the test could not fail


def test_stopping_by_decide_keeps_the_claim_valid_and_saves_samples():
    rng, alpha, n, repeats = np.random.default_rng(4), 0.05, 20_000, 400
    p, spent, false = 0.9, 0, 0
    truth = SIGMA * stats.norm.ppf(p)
    stop_at = [0.5 * truth, 1.0001 * truth]  # one easy, one that is just not true
    for _ in range(repeats):
        k = t = 0
        for look in looks(n):
            k, t = k + int(rng.binomial(look - t, p)), look
            if decide_all(k, t, stop_at, sigma=SIGMA, alpha=alpha, n=n):
                break
        spent += t
        false += vote_radius(k, t, alpha, SIGMA, sequence=True) > truth
    assert false <= stats.binom.ppf(0.999, repeats, alpha)
    assert spent < repeats * n  # futility alone must end some


# The planted mistakes: each is one line away from what is right, and each must turn the check red.


def reused_selection_votes(world, rng):
    votes = rng.multinomial(world.n, world.probabilities, size=world.repeats)
    chosen = votes.argmax(axis=1)  # the same votes choose the class and bound it
    return or_abstain(chosen, tabulate(lambda k: vote_radius(k, world.n, world.alpha, SIGMA), votes.max(axis=1)))


def without_the_floor(world, rng):
    predictions, radii = BOUNDS["clopper-pearson"](world, np.random.default_rng(rng.integers(2**32)))
    chosen = select(world, rng)
    return np.where(predictions < 0, chosen, predictions), radii  # predicts although the bound is at most 1/2


MISTAKES = {
    "reused selection votes": reused_selection_votes,
    "uncorrected peeking": peeking(clopper_pearson_lower, every_hundredth),
    "the floor removed": without_the_floor,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_planted_mistake_turns_the_check_red(name):
    with pytest.raises(AssertionError, match="false"):
        check_false_rate(MISTAKES[name], list(worlds(2000)))
    check_false_rate(BOUNDS["clopper-pearson"], list(worlds(2000)))  # as strict, and ours passes


def test_peeking_and_reuse_cost_what_the_methods_page_says():
    rng, alpha, repeats = np.random.default_rng(5), 0.001, 20_000
    totals = np.arange(1000, 100_001, 1000)
    votes = np.cumsum(rng.binomial(1000, 0.5, size=(repeats, len(totals))), axis=1)
    critical = stats.binom.isf(alpha, totals, 0.5) + 1  # the fewest votes whose Clopper-Pearson bound is above 1/2
    assert np.all(clopper_pearson_lower(critical, totals, alpha) > 0.5)
    assert np.all(clopper_pearson_lower(critical - 1, totals, alpha) <= 0.5)
    assert (votes >= critical).any(axis=1).mean() == pytest.approx(0.014, rel=0.25)
    reuse = 2 * stats.binom.sf(critical[9] - 1, 10_000, 0.5)  # either of two tied classes may win its own bound
    assert reuse == pytest.approx(0.00185, rel=0.05)
