"""Radii and claims out of a Gaussian, against sampling it, closed forms, and each other."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from rsplugins.certificate import Guarantee
from rsplugins.errors import ParameterError, RunError
from rsplugins.moments.claims import RULES, covariance, covariance_guided, estimated_radius, log_failure
from rsplugins.moments.estimator import evidence_of
from rsplugins.moments.network import LogitGaussian
from tests.moments.tensor_radii import as_published_radius, pairwise_radius, union_radius


def gaussian(seed, classes=10, gap=1.0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(classes, classes))
    mean = rng.normal(size=classes)
    mean[3] = mean.max() + gap
    return mean, root @ root.T / classes


def evidence(seed, **options):
    mean, table = gaussian(seed, **options)
    return evidence_of(LogitGaussian(torch.tensor(mean), torch.tensor(table)))


@pytest.mark.parametrize("seed", range(4))
def test_sampled_failure_agrees_with_sampling_the_gaussian(seed):
    mean, table = gaussian(seed)
    draws = np.random.default_rng(99).multivariate_normal(mean, table, size=400_000)
    frequency = (draws.argmax(1) != 3).mean()
    found = math.exp(log_failure(evidence(seed), "sampled"))
    assert found == pytest.approx(frequency, rel=0.05)
    assert found <= math.exp(log_failure(evidence(seed), "union")) * (1 + 1e-12)


def test_sampled_failure_stays_accurate_where_nothing_could_be_sampled():
    said = {"kept": [0, 1, 2], "mean": [30.0, 0.0, 0.0], "covariance": np.diag([0.0, 1.0, 1.0]).tolist(), "others": None}
    # two independent events of probability Phi(-30)
    assert log_failure(said, "sampled") == pytest.approx(math.log(2) + stats.norm.logcdf(-30), abs=0.02)
    same = {"kept": [0, 1, 2], "mean": [30.0, 0.0, 0.0], "covariance": [[0, 0, 0], [0, 1, 1], [0, 1, 1]], "others": None}
    assert log_failure(same, "sampled") == pytest.approx(stats.norm.logcdf(-30), abs=1e-6)


def test_two_classes_have_one_radius_by_every_rule_but_the_published():
    said = {"kept": [1, 0], "mean": [2.0, 0.5], "covariance": [[1.0, 0.3], [0.3, 0.8]], "others": None}
    expected = 0.25 * 1.5 / math.sqrt(1.0 + 0.8 - 0.6)
    for rule in ("union", "sampled", "pairwise"):
        assert estimated_radius(said, 0.25, rule) == pytest.approx(expected, rel=1e-9)
    assert estimated_radius(said, 0.25, "as-published") == pytest.approx(0.25 * 1.5 / math.sqrt(1.0 + 0.8 + 0.6))


@pytest.mark.parametrize("seed", range(6))
def test_torch_and_numpy_read_the_same_radii(seed):
    mean, table = gaussian(seed, gap=2.0)
    batch = torch.tensor(mean).unsqueeze(0), torch.tensor(table).unsqueeze(0)
    said = evidence(seed, gap=2.0)
    assert pairwise_radius(*batch, 0.5).item() == pytest.approx(estimated_radius(said, 0.5, "pairwise"))
    assert union_radius(*batch, 0.5).item() == pytest.approx(estimated_radius(said, 0.5, "union"), abs=1e-9)
    assert as_published_radius(*batch, 0.5).item() == pytest.approx(estimated_radius(said, 0.5, "as-published"))


def test_rules_are_ordered():
    for seed in range(6):
        said = evidence(seed, gap=2.0)
        union, sampled, pairwise = (estimated_radius(said, 0.5, rule) for rule in ("union", "sampled", "pairwise"))
        assert 0 < union <= sampled * (1 + 1e-9) <= pairwise * (1 + 1e-6)


def test_radii_do_not_grow_when_a_gap_shrinks():
    said = evidence(1, gap=3.0)
    for rule in RULES:
        last = math.inf
        for step in range(8):
            mean = [said["mean"][0] - 0.4 * step, *said["mean"][1:]]
            if mean[0] < max(mean[1:]):
                break
            radius = estimated_radius({**said, "mean": mean}, 0.5, rule)
            assert radius <= last + 1e-9
            last = radius


def test_a_thousand_classes_keep_a_small_record_with_the_same_union():
    mean, table = gaussian(0, classes=300, gap=4.0)
    said = evidence_of(LogitGaussian(torch.tensor(mean), torch.tensor(table)))
    assert len(said["kept"]) == 20
    z = [(mean[3] - mean[k]) / math.sqrt(table[3, 3] + table[k, k] - 2 * table[3, k]) for k in range(300) if k != 3]
    assert math.exp(log_failure(said)) == pytest.approx(stats.norm.cdf(-np.array(z)).sum(), rel=1e-9)


def test_the_claim_is_an_estimate_or_an_abstention():
    said = evidence(0, gap=2.0)
    claim = covariance(said, {"sigma": 0.25, "rule": "union"})
    assert claim.guarantee is Guarantee.ESTIMATE
    assert not claim.guarantee.certifies
    assert claim.prediction == 3
    assert claim.radius <= estimated_radius(said, 0.25, "union")
    tie = {"kept": [4, 1, 2], "mean": [1.0, 1.0, 1.0], "covariance": np.eye(3).tolist(), "others": None}
    assert covariance(tie, {"sigma": 0.25, "rule": "union"}).prediction is None
    with pytest.raises(ParameterError, match="no rule"):
        estimated_radius(said, 0.25, "nonsense")


@pytest.mark.parametrize(
    "damage",
    [{"mean": [1.0]}, {"covariance": [[1.0]]}, {"mean": [0.0, 1.0]}, {"mean": [math.nan, 0.0]}, {"kept": [0]}],
)
def test_damaged_gaussians_are_refused(damage):
    said = {"kept": [0, 1], "mean": [1.0, 0.0], "covariance": [[1.0, 0.0], [0.0, 1.0]], "others": None}
    with pytest.raises(RunError, match="Gaussian"):
        covariance({**said, **damage}, {"sigma": 0.25, "rule": "union"})


GUIDED = {"sigma": 0.25, "alpha": 0.001, "n": 10_000, "n_min": 500}


def test_the_guided_claim_is_clopper_pearson_at_all_of_alpha():
    said = {"class": 7, "n": 1000, "failure": -3.0, "estimation": {"7": 990, "1": 10}}
    claim = covariance_guided(said, GUIDED)
    expected = 0.25 * stats.norm.ppf(stats.beta.ppf(0.001, 990, 11))
    assert (claim.prediction, claim.alpha, claim.guarantee) == (7, 0.001, Guarantee.PROBABILISTIC)
    assert expected * (1 - 1e-6) < claim.radius <= expected
    assert covariance_guided({**said, "class": 2}, GUIDED).prediction is None
    assert covariance_guided({**said, "failure": 0.0}, GUIDED) == claim  # the estimate has no part in the claim


@pytest.mark.parametrize(
    "damage",
    [
        {"n": 1001},
        {"estimation": {"7": 1001, "1": -1}},
        {"estimation": {"7": 990.0, "1": 10}},
        {"n": 100, "estimation": {"7": 100}},
    ],
)
def test_votes_that_do_not_fit_are_refused(damage):
    said = {"class": 7, "n": 1000, "failure": -3.0, "estimation": {"7": 990, "1": 10}, **damage}
    with pytest.raises(RunError, match="votes"):
        covariance_guided(said, GUIDED)


def test_claims_and_plans_load_no_torch():
    code = "import rsplugins.moments.claims, rsplugins.moments.sample_plan, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_union_radius_has_finite_gradients_from_hopeless_to_certain():
    mean = torch.tensor([[0.0, 50.0], [0.0, 0.1], [1.0, 0.0], [200.0, 0.0]], dtype=torch.float64, requires_grad=True)
    table = 0.5 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2)
    radius = union_radius(mean, table, 0.25, torch.zeros(4, dtype=torch.long))
    radius.sum().backward()
    assert radius.tolist() == pytest.approx([-0.75, -0.025, 0.25, 50.0], rel=1e-6)
    assert mean.grad[1:].flatten().tolist() == pytest.approx([0.25, -0.25] * 3, rel=1e-6)
    assert bool(mean.grad.isfinite().all())
