"""The certifier ``covariance-guided``: plans before it samples, claims from votes alone."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from scipy import stats
from torch import nn

import rsplugins
from rsplugins.certificate import Guarantee
from rsplugins.certifiers.covariance_guided import CovarianceGuided
from rsplugins.data import load as load_data
from rsplugins.errors import ImpossibleBudgetError, ParameterError
from rsplugins.moments import claims
from rsplugins.sampling import Draw


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits", split="test")
    return rsplugins.load("zoo:digits-cnn.digits-gaussian025-v2"), torch.stack([data[index][0] for index in range(0, 240, 30)])


@pytest.fixture(scope="module")
def found(digits):
    return rsplugins.certify(*digits, "covariance-guided", n=4000, n_min=100, tolerance=0.02)


def test_radii_are_clopper_pearson_of_the_votes_at_the_planned_number(found):
    for certificate in found:
        said = certificate.evidence
        votes = said["estimation"].get(str(said["class"]), 0)
        assert certificate.samples == said["n"] == sum(said["estimation"].values())
        assert 100 <= said["n"] <= 4000
        assert certificate.guarantee is Guarantee.PROBABILISTIC
        expected = 0.25 * stats.norm.ppf(stats.beta.ppf(0.001, votes, said["n"] - votes + 1)) if votes else 0.0
        assert certificate.radius == pytest.approx(max(expected, 0.0), abs=1e-6)
        assert claims.covariance_guided(json.loads(json.dumps(said)), certificate.parameters).radius == certificate.radius


def test_fewer_samples_lose_little_radius_against_gaussian(digits, found):
    plain = rsplugins.certify(*digits, "gaussian", n=4000)
    loss = [one.radius - other.radius for one, other in zip(plain, found, strict=True)]
    assert sum(loss) / len(loss) < 0.04
    assert sum(c.evidence["n"] for c in found) < 0.8 * 4000 * len(found)
    assert all(c.prediction in (g.prediction, None) for c, g in zip(found, plain, strict=True))


def test_the_plan_does_not_look_at_the_samples(digits, found):
    other = rsplugins.certify(*digits, "covariance-guided", n=4000, n_min=100, tolerance=0.02, seed=77)
    assert [(c.evidence["n"], c.evidence["class"]) for c in other] == [(c.evidence["n"], c.evidence["class"]) for c in found]
    assert [c.evidence["estimation"] for c in other] != [c.evidence["estimation"] for c in found]


def test_a_program_asks_once_and_takes_the_class_of_the_estimate(digits):
    classifier, x = digits
    certifier = CovarianceGuided(classifier, CovarianceGuided.Parameters(n=1000), rsplugins.Execution())
    (estimate,) = certifier.estimator.run([rsplugins.Input(5, x[0])])
    program = certifier._program(estimate)
    assert inspect.isgenerator(program)
    draw = next(program)
    assert isinstance(draw, Draw)
    assert draw.start == 0
    assert 500 <= draw.stop <= 1000


def test_results_do_not_depend_on_the_batch_or_the_company(digits, found):
    classifier, x = digits
    alone = rsplugins.certify(
        classifier, x[3:4], "covariance-guided", n=4000, n_min=100, tolerance=0.02, indices=[3], batch_size=37
    )[0]
    assert alone.evidence["estimation"] == found[3].evidence["estimation"]


def test_the_guarantee_holds_when_the_estimate_is_wrong():
    """A network that propagation misjudges badly: the claim must still hold, at the true probability."""

    class Spiky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(1, 2), nn.Linear(2, 2)
            with torch.no_grad():
                self.first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
                self.first.bias.copy_(torch.tensor([-0.9, 0.1]))
                self.second.weight.copy_(torch.tensor([[0.0, 0.0], [40.0, 40.0]]))
                self.second.bias.copy_(torch.tensor([1.0, 0.0]))

        def forward(self, x):
            return self.second(torch.relu(self.first(x.flatten(1))))

    classifier = rsplugins.wrap(Spiky(), input_size=(1, 1, 1), num_classes=2)
    sigma, x = 0.25, torch.full((1, 1, 1, 1), 0.5)
    # class 0 wins where both ReLUs stay below 1/40: 0.075 < x < 0.925
    p = stats.norm.cdf(0.425 / sigma) - stats.norm.cdf(-0.425 / sigma)
    true_radius = sigma * stats.norm.ppf(p)
    for seed in range(20):
        found = rsplugins.certify(classifier, x, "covariance-guided", n=2000, seed=seed)[0]
        assert found.prediction in (0, None)
        assert found.radius <= true_radius


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"n_min": 5}, ImpossibleBudgetError),
        ({"n": 100, "n_min": 500}, ParameterError),
        ({"tolerance": 0}, ParameterError),
        ({"sigma": -1}, ParameterError),
        ({"alpha": 1.0}, ParameterError),
    ],
)
def test_impossible_parameters_are_refused(digits, parameters, error):
    with pytest.raises(error):
        rsplugins.certify(*digits, "covariance-guided", **parameters)
