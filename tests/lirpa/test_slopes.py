"""alpha-CROWN's slopes: each input stops for itself, and what it stopped with holds and does not depend on the others."""

import itertools

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.errors import ParameterError
from rsplugins.lirpa import slopes
from rsplugins.lirpa.slopes import Progression
from tests.lirpa.cases import settle


def run(rows, enough, iterations=20):
    """The bounds that are kept and the iteration each input was closed at, of bounds (T, B, S)."""
    seen = Progression(iterations, torch.tensor(enough))
    closed = torch.stack([seen(row)[:, 0] for row in rows])
    return seen.tightened(rows[-1]), [int(column.long().argmax()) if column.any() else None for column in closed.T]


def test_an_input_closes_when_it_is_certified_and_keeps_those_bounds():
    rising = torch.arange(20.0).view(-1, 1, 1) - 5.5  # certified from the seventh on
    kept, closed = run(rising, [0.0])
    assert (float(kept), closed) == (0.5, [6])


def test_an_input_closes_when_it_no_longer_rises_or_would_not_get_there():
    flat = torch.full((20, 1, 1), -0.1)
    far = torch.arange(20.0).view(-1, 1, 1) - 40
    just = torch.arange(20.0).view(-1, 1, 1) - 18.5
    kept, closed = run(torch.cat([flat, far, just], 1), [0.0, 0.0, 0.0])
    assert closed == [4, 4, 19]
    assert kept.flatten().tolist() == pytest.approx([-0.1, -36.0, 0.5])


def test_the_best_of_each_row_is_kept_while_the_input_is_open():
    bounds = torch.tensor([[[1.0, -3.0]], [[0.5, -1.0]], [[2.0, -2.0]]])
    kept, _ = run(bounds, [5.0])
    assert kept.tolist() == [[2.0, -1.0]]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))
    return rsplugins.wrap(settle(net).float(), input_size=(1, 6, 6))


def margins(certificate):
    return torch.tensor((certificate.evidence["certified"] or certificate.evidence["refuted"])["margins"])


def test_bounds_are_the_same_alone_and_in_company(classifier):
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    for eps in (0.01, 0.05, 0.2):
        together = rsplugins.certify(classifier, x, "alpha-crown", eps=eps)
        for image, found in zip(x, together, strict=True):
            alone = rsplugins.certify(classifier, image[None], "alpha-crown", eps=eps)[0]
            torch.testing.assert_close(margins(found), margins(alone), rtol=1e-5, atol=1e-6)
            assert alone.radius == found.radius


def test_more_iterations_are_never_looser_and_one_is_crown(classifier):
    x, eps = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)), 0.3
    crown, *found = (
        torch.stack([margins(one) for one in rsplugins.certify(classifier, x, method, eps=eps, **settings)])
        for method, settings in [("crown", {}), *(("alpha-crown", {"iterations": n}) for n in (1, 5, 20))]
    )
    torch.testing.assert_close(found[0], crown, rtol=1e-4, atol=1e-5)
    for fewer, more in itertools.pairwise(found):
        assert (more >= fewer - 1e-5).all()
    assert (found[-1] > crown + 1e-3).any(), "the slopes are optimised"


def test_bounds_hold_at_drawn_points(classifier):
    x, eps = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(2)), 0.1
    (found,) = rsplugins.certify(classifier, x, "alpha-crown", eps=eps, clip=False)
    points = x + eps * (2 * torch.rand(20_000, 1, 6, 6) - 1).sign()
    with torch.no_grad():
        logits = classifier.module(points)
    label = int(found.evidence["logits"].index(max(found.evidence["logits"])))
    leads = logits[:, [label]] - logits[:, [k for k in range(4) if k != label]]
    assert (leads.amin(0) >= margins(found)).all()


def test_it_stops_early(classifier, monkeypatch):
    counts = []
    original = Progression.__call__
    monkeypatch.setattr(Progression, "__call__", lambda self, lower: counts.append(1) or original(self, lower))
    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    rsplugins.certify(classifier, x, "alpha-crown", eps=1e-4)
    assert len(counts) == 1  # CROWN certifies it
    counts.clear()
    rsplugins.certify(classifier, x, "alpha-crown", eps=0.5, iterations=60)
    assert slopes._PATIENCE < len(counts) < 30


def test_iterations_are_at_least_one(classifier):
    with pytest.raises(ParameterError, match="iterations"):
        rsplugins.certify(classifier, torch.rand(1, 1, 6, 6), "alpha-crown", iterations=0)
