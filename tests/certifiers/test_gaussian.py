import math
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import integrate, special, stats
from torch import nn

from rsplugins.certificate import Guarantee, Norm
from rsplugins.certifier import Execution, Input
from rsplugins.certifiers.gaussian import Gaussian, GaussianSoft
from rsplugins.classifier import wrap
from rsplugins.errors import ImpossibleBudgetError
from rsplugins.sampling import GaussianNoise
from rsplugins.statistics import claims

SHAPE = (1, 4, 4)


def half_space(scale=1.0):
    """Two classes divided by a plane, w and b known: the smoothed classifier is the classifier itself."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    w, b = torch.randn(16, generator=torch.Generator().manual_seed(4)), -0.4
    with torch.no_grad():
        module[1].weight.copy_(torch.stack([scale * w, torch.zeros(16)]))
        module[1].bias.copy_(torch.tensor([scale * b, 0.0]))
    return wrap(module, input_size=SHAPE), w.double(), b


def certify(kind, classifier, x, *, seed=0, batch_size=128, **parameters):
    certifier = kind(classifier, kind.Parameters(**parameters), Execution(seed=seed, batch_size=batch_size))
    gathered = list(certifier.gather(Input(i, image) for i, image in enumerate(x)))
    values = certifier.parameters.model_dump()
    claim = {Gaussian: claims.gaussian, GaussianSoft: claims.gaussian_soft}[kind]
    return gathered, [claim(one.evidence, values) for one in gathered]


def images(count, seed=1):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_half_space_radii_never_exceed_the_distance_and_come_close():
    classifier, w, b = half_space()
    x = images(60)
    distances = (x.double().flatten(1) @ w + b) / w.norm()
    gathered, claims = certify(Gaussian, classifier, x, n=2000)
    certified = [(claim, float(d)) for claim, d in zip(claims, distances, strict=True) if claim.prediction is not None]
    assert len(certified) > 50
    for claim, distance in certified:
        assert claim.radius <= abs(distance)
        assert claim.prediction == (0 if distance > 0 else 1)
    ratios = [claim.radius / abs(d) for claim, d in certified if 0.1 < abs(d) < 0.5]
    assert len(ratios) > 5
    assert np.median(ratios) > 0.8
    assert {one.samples for one in gathered} == {2100}
    assert all((claim.guarantee, claim.norm, claim.alpha) == (Guarantee.PROBABILISTIC, Norm.L2, 0.001) for claim in claims)


def test_selection_and_estimation_are_the_stated_samples():
    classifier, *_ = half_space()
    x = images(1)[0]
    out = torch.empty(500, *SHAPE)
    GaussianNoise(0.25, 9).perturb(x, out, 0, 0)
    votes = classifier(out).argmax(1).tolist()
    gathered, claims = certify(Gaussian, classifier, x[None], n0=50, n=450, seed=9)
    assert gathered[0].evidence["selection"] == {str(k): v for k, v in sorted(Counter(votes[:50]).items())}
    estimation = Counter(votes[50:])
    assert gathered[0].evidence["estimation"] == {str(k): v for k, v in sorted(estimation.items())}
    chosen = Counter(votes[:50]).most_common(1)[0][0]
    p = stats.beta.ppf(0.001, estimation[chosen], 450 - estimation[chosen] + 1)
    expected = 0.25 * stats.norm.ppf(p) if p > 0.5 else 0.0
    assert claims[0].radius == pytest.approx(expected, rel=1e-6)
    assert claims[0].radius <= expected


def test_the_cap_of_unanimous_votes_is_the_golden_value():
    classifier, *_ = half_space(1e4)
    x = torch.ones(1, *SHAPE)
    with torch.no_grad():
        classifier.module[1].weight[0].fill_(1e4)
    _, claims = certify(Gaussian, classifier, x, sigma=0.25, n=10_000)
    assert math.floor(claims[0].radius / 0.25 * 1e4) / 1e4 == pytest.approx(3.1986, abs=1e-4)


@pytest.mark.parametrize("radii", [(0.1,), (0.1, 0.3)])
def test_stop_at_saves_samples_keeps_soundness_and_ignores_the_batch_size(radii):
    classifier, w, b = half_space()
    x = images(30)
    distances = (x.double().flatten(1) @ w + b) / w.norm()
    gathered, claims = certify(Gaussian, classifier, x, n=5000, stop_at=radii)
    assert all(claim.radius <= abs(float(d)) for claim, d in zip(claims, distances, strict=True))
    assert sum(one.samples for one in gathered) < 0.6 * 30 * 5100
    decided = [claim.radius >= radii[0] for claim, d in zip(claims, distances, strict=True) if abs(float(d)) > 1.6 * radii[0]]
    assert decided
    assert all(decided)
    for batch_size in (1, 1000):
        again, _ = certify(Gaussian, classifier, x[:4], n=5000, stop_at=radii, batch_size=batch_size)
        assert [one.evidence for one in again] == [one.evidence for one in gathered[:4]]


@pytest.mark.parametrize("options", [{}, {"bound": "hoeffding"}, {"runner_up": "bounded"}])
def test_soft_radii_stay_below_the_exact_radius_of_the_smoothed_scores(options):
    # softmax([s, 0]) = sigmoid(s); s is normal with known mean and deviation, so E[sigmoid(s)] is a one-dimensional integral.
    classifier, w, b = half_space(4.0)
    x, sigma = images(12), 0.5
    _, claims = certify(GaussianSoft, classifier, x, sigma=sigma, n=4000, **options)
    certified = 0
    for image, claim in zip(x, claims, strict=True):
        mean, deviation = 4.0 * (float(image.double().flatten() @ w) + b), 4.0 * sigma * float(w.norm())
        smoothed = lambda z, m=mean, s=deviation: special.expit(m + s * z) * stats.norm.pdf(z)  # noqa: E731
        score = integrate.quad(smoothed, -9, 9, limit=200)[0]
        exact = sigma * abs(stats.norm.ppf(score))
        assert claim.radius <= exact
        if claim.prediction is not None:
            certified += 1
            assert claim.prediction == (0 if score > 0.5 else 1)
            assert claim.radius > 0.7 * exact - 0.05
    assert certified >= 6


def test_soft_evidence_keeps_few_classes_unless_all_must_be_bounded():
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 12))
    classifier = wrap(module, input_size=SHAPE)
    for rule, kept in (("complement", 5), ("bounded", 12)):
        gathered, _ = certify(GaussianSoft, classifier, images(1), n=200, runner_up=rule)
        evidence = gathered[0].evidence
        assert evidence["classes"] == 12
        assert len(evidence["selection"]["sums"]) == len(evidence["estimation"]["sums"]) == kept
        assert max(evidence["selection"]["sums"], key=evidence["selection"]["sums"].get) in evidence["estimation"]["squares"]


@pytest.mark.parametrize("kind", [Gaussian, GaussianSoft])
def test_an_impossible_budget_is_refused_with_the_smallest_n_that_works(kind):
    classifier, *_ = half_space()
    with pytest.raises(ImpossibleBudgetError) as caught:
        kind(classifier, kind.Parameters(n=10), Execution())
    smallest = int(caught.value.what.rsplit(" ", 1)[1].rstrip("."))
    kind(classifier, kind.Parameters(n=smallest), Execution())
    with pytest.raises(ImpossibleBudgetError):
        kind(classifier, kind.Parameters(n=smallest - 1), Execution())


def test_a_radius_to_stop_at_that_is_out_of_reach_is_refused():
    classifier, *_ = half_space()
    with pytest.raises(ImpossibleBudgetError):
        Gaussian(classifier, Gaussian.Parameters(sigma=0.25, n=1000, stop_at=(0.1, 1.0)), Execution())


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0}, {"sigma": math.nan}, {"n0": 0}, {"n": 0}, {"alpha": 0}, {"alpha": 1}, {"stop_at": (-1,)}, {"tau": 1}]
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Gaussian.Parameters(**wrong)


def test_what_changes_the_function_is_described():
    classifier, *_ = half_space()
    described = Gaussian(classifier, Gaussian.Parameters(), Execution(dtype="bfloat16")).describe()
    assert (described["dtype"], described["compile"]) == ("bfloat16", False)
