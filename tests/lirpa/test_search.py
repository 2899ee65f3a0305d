"""The largest certified eps, batches that fit the memory, and claims recomputed from the evidence alone."""

import json
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from rsplugins.errors import RspluginsWarning
from rsplugins.lirpa import claims
from rsplugins.lirpa.search import Bracket, Margins, Search, margin_rows

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


def linear(images, eps, specification):
    """Margins of a network that loses 10 eps on every margin: certified up to a tenth of the smallest margin."""
    logits = LOGITS[images.flatten().long()]
    return torch.einsum("bsk,bk->bs", specification.double(), logits) - 10 * eps.unsqueeze(1)


IMAGES = torch.arange(3.0).view(3, 1)


def test_margin_rows_are_prediction_minus_each_other():
    rows = margin_rows(torch.tensor([2, 0]), 3)
    found = torch.einsum("bsk,bk->bs", rows.double(), LOGITS[[1, 0]])
    assert found.tolist() == [[2.0, 1.5], [2.0, 3.0]]


@pytest.mark.parametrize("few", [False, True])
def test_the_largest_eps_is_within_tolerance_and_below(few):
    found = Search(Margins(linear), "float64", few=few).largest(IMAGES, LOGITS, max_eps=1.0, tolerance=1e-3)
    for evidence, truth in zip(found, (0.2, 0.15, 0.0), strict=True):
        claim = claims.ibp(evidence, {"norm": "linf", "dtype": "float64"})
        assert truth - 1e-3 <= claim.radius <= truth
        assert evidence["refuted"]["eps"] > truth or truth == 0
    assert [claims.ibp(e, {"norm": "linf", "dtype": "float64"}).prediction for e in found] == [0, 2, 0]


@pytest.mark.parametrize(
    ("dtype", "pixel", "eps"), [("float32", 0.0, 0.7), ("float32", 0.5, 0.15), ("float64", 0.5, 0.1), ("float64", 0.6, 0.7)]
)
def test_a_ball_that_rounding_makes_smaller_than_the_one_claimed(dtype, pixel, eps):
    # A margin of 1 that falls steeply at an edge between the end of the ball as it is rounded and its true end.
    kind = getattr(torch, dtype)
    end = (torch.tensor(pixel, dtype=kind) + torch.tensor(eps, dtype=kind)).item()
    true_end = Fraction(torch.tensor(pixel, dtype=kind).item()) + Fraction(eps)
    assert Fraction(end) < true_end
    edge = (Fraction(end) + true_end) / 2  # at the true end the margin is negative, so eps is not certified

    def steep(images, radius, specification):
        ends = (images.to(kind) + radius.to(kind).view(-1, 1)).flatten().tolist()
        return torch.tensor([[float(min(1, (edge - Fraction(z)) * 10**20))] for z in ends], dtype=torch.float64)

    found = Search(Margins(steep), dtype).at(torch.tensor([[pixel]], dtype=kind), torch.tensor([[1.0, 0.0]]), eps)
    assert claims.ibp(found[0], {"norm": "linf", "dtype": dtype}).radius == 0.0


def test_certified_at_the_largest_eps_stops_there():
    calls = []

    def counted(images, eps, specification):
        calls.append(len(images))
        return linear(images, eps, specification)

    found = Search(Margins(counted), "float64").largest(IMAGES[:1], LOGITS[:1], max_eps=0.1, tolerance=1e-6)
    assert (found[0]["certified"]["eps"], found[0]["refuted"]) == (0.1, None)
    assert sum(calls) <= 6


CURVES = {
    "linear": (lambda eps: 1 - 5 * eps, 0.2),
    "a power": (lambda eps: 1 - (eps / 0.0173) ** 1.7, 0.0173),
    "a knee": (lambda eps: 10 - 5 * eps - 4000 * max(0.0, eps - 0.17), 0.17 + 9.15 / 4005),
    "a jump": (lambda eps: 1 - eps if eps < 0.0437 else -1e9, 0.0437),
    "overflow": (lambda eps: 3 - 40 * eps if eps < 0.1 else float("nan"), 0.075),
    "flat": (lambda eps: 1.0 if eps < 0.31 else 1.0 - 1e4 * (eps - 0.31), 0.31 + 1e-4),
    "steep at once": (lambda eps: 1 - 1e6 * eps, 1e-6),
    "nothing": (lambda eps: -1.0, 0.0),
    "all": (lambda eps: 1.0, 0.5),
}


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_a_bracket_closes_on_any_curve(curve, few):
    margin, truth = CURVES[curve]
    bracket, asked = Bracket(max(margin(0.0), 0.0), 0.5, 1e-4, few=few), 0
    while not bracket.is_done:
        for eps in bracket.trials():
            assert bracket.low < eps <= 0.5 or eps < bracket.high, "what is asked lies where it can tell something"
            asked += 1
            bracket.learn(eps, margin(eps), margin(eps) > 0)
        assert asked < 60
    assert truth - 1e-4 <= bracket.low <= truth < bracket.high or bracket.low == 0.5 == truth
    assert asked <= (30 if few else 48)


def test_what_is_recorded_are_the_nearest_ends_of_all_that_was_asked():
    asked = []

    def noted(images, eps, specification):
        asked.extend(float(one) for one in eps)
        return linear(images, eps, specification)

    (evidence,) = Search(Margins(noted), "float64").largest(IMAGES[:1], LOGITS[:1], max_eps=1.0, tolerance=1e-3)
    near = {"rel": 1e-6}
    assert evidence["certified"]["eps"] == pytest.approx(max(eps for eps in asked if eps < 0.2), **near)
    assert evidence["refuted"]["eps"] == pytest.approx(min(eps for eps in asked if eps > 0.2), **near)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("tolerance", [0.5, 0.9, 0.2, 0.01])
def test_a_coarse_tolerance_is_kept(tolerance, few):
    for truth in (0.0, 0.03, 0.3, 0.49, 0.5):
        bracket, asked = Bracket(truth, 0.5, tolerance, few=few), 0
        while not bracket.is_done:
            for eps in bracket.trials():
                bracket.learn(eps, truth - eps, eps <= truth and truth > 0)
            asked += 1
            assert asked < 20
        assert bracket.low <= truth < bracket.low + tolerance + 1e-12 or bracket.low == 0.5


def test_a_smooth_curve_takes_fewer_rounds_than_bisection():
    bracket, rounds = Bracket(1.0, 0.5, 1e-4), 0
    while not bracket.is_done:
        rounds += 1
        for eps in bracket.trials():
            margin = 1 - (eps / 0.0173) ** 1.7
            bracket.learn(eps, margin, margin > 0)
    assert rounds <= 4  # 13 by bisection


def test_what_an_input_is_asked_does_not_depend_on_its_company():
    alone = [Search(Margins(linear), "float64").largest(IMAGES[i : i + 1], LOGITS[i : i + 1], 1.0, 1e-3)[0] for i in range(3)]
    assert Search(Margins(linear), "float64").largest(IMAGES, LOGITS, 1.0, 1e-3) == alone


def test_where_bounds_are_not_monotone_what_was_certified_stands():
    def gap(images, eps, specification):
        lower = linear(images, eps, specification)
        lower[(eps > 0.01) & (eps < 0.05)] = -1.0
        return lower

    (evidence,) = Search(Margins(gap), "float64").largest(IMAGES[:1], LOGITS[:1], max_eps=0.16, tolerance=1e-3)
    claim = claims.ibp(evidence, {"norm": "linf", "dtype": "float64"})
    assert claim.radius == (evidence["certified"] or {"eps": 0.0})["eps"]
    assert evidence["refuted"] is None or evidence["refuted"]["eps"] > claim.radius


def test_one_eps_is_verified_or_not():
    found = Search(Margins(linear), "float64").at(IMAGES, LOGITS, 0.18)
    radii = [claims.crown(evidence, {"norm": "l2", "dtype": "float64"}).radius for evidence in found]
    assert radii == [0.18, 0.0, 0.0]


def test_a_bound_that_is_not_a_number_certifies_nothing():
    def broken(images, eps, specification):
        return linear(images, eps, specification) * float("nan")

    (evidence,) = Search(Margins(broken), "float64").at(IMAGES[:1], LOGITS[:1], 0.01)
    assert evidence["refuted"]["margins"] == [None, None]
    assert claims.ibp(json.loads(json.dumps(evidence)), {"norm": "linf", "dtype": "float64"}).radius == 0.0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not enough memory"), MemoryError()]
)
def test_out_of_memory_halves_inputs_then_rows_and_says_so(error):
    sizes = []

    def limited(images, eps, specification):
        sizes.append((len(images), specification.shape[1]))
        if len(images) * specification.shape[1] > 1:
            raise error
        return linear(images, eps, specification)

    margins = Margins(limited, batch=3, rows=2)
    rows, eps = margin_rows(LOGITS.argmax(1), 3), torch.full((3,), 0.01, dtype=torch.float64)
    with pytest.warns(RspluginsWarning) as warned:
        found = margins(IMAGES, eps, rows)
    said = [str(w.message) for w in warned]
    assert len(said) == 2
    assert "going on with 1 inputs at a time" in said[0]
    assert "going on with 1 specification rows at a time" in said[1]
    torch.testing.assert_close(found, Margins(linear)(IMAGES, eps, rows))
    assert (margins.batch, margins.rows) == (1, 1)


def test_out_of_memory_with_one_row_is_the_callers():
    def never(images, eps, specification):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), pytest.warns(RspluginsWarning):
        Margins(never, batch=2)(IMAGES, torch.ones(3), margin_rows(LOGITS.argmax(1), 3))


def test_other_errors_are_not_taken_for_memory():
    def wrong(images, eps, specification):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Margins(wrong)(IMAGES, torch.ones(3), margin_rows(LOGITS.argmax(1), 3))


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 1), (1, 2), (7, 9)])
def test_chunks_do_not_change_bounds(batch, rows):
    specification, eps = margin_rows(LOGITS.argmax(1), 3), torch.rand(3)
    torch.testing.assert_close(
        Margins(linear, batch, rows)(IMAGES, eps, specification), linear(IMAGES, eps, specification).double()
    )


def test_slack_is_relative_to_the_logits():
    assert claims.is_certified([1e-9], [1.0, 0.0], "float64")
    assert not claims.is_certified([1e-9], [1.0, 0.0], "float32")
    assert not claims.is_certified([1e-9], [100.0, 0.0], "float64")


def many(images, eps, specification):
    logits = MANY[images.flatten().long()]
    return torch.einsum("bsk,bk->bs", specification.double(), logits) - 10 * eps.unsqueeze(1)


MANY = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eps", [None, 0.01, 0.4])
def test_records_of_a_thousand_classes_are_small_and_claim_the_same(monkeypatch, eps):
    images = torch.arange(4.0).view(4, 1)

    def found():
        search = Search(Margins(many), "float64")
        return search.largest(images, MANY, 0.5, 1e-4) if eps is None else search.at(images, MANY, eps)

    small = json.loads(json.dumps(found()))
    monkeypatch.setattr(claims, "_MANY", 10_000)
    whole = found()
    parameters = {"norm": "linf", "precision": "float64"}
    for one, other in zip(small, whole, strict=True):
        assert len(json.dumps(one)) < 2000 < len(json.dumps(other))
        assert claims.ibp(one, parameters) == claims.ibp(other, parameters)
        assert is_near(claims.ibp(one, parameters).radius, MANY, claims.ibp(one, parameters).prediction, eps)


def is_near(radius, logits, prediction, eps):
    top = logits.sort(1, descending=True).values
    leads = (top[:, 0] - top[:, 1])[logits.argmax(1) == prediction] / 10
    return any(radius <= lead < radius + 1e-4 if eps is None else radius == (eps if lead > eps else 0) for lead in leads.tolist())


def test_a_bound_that_is_not_a_number_is_kept_among_the_smallest():
    evidence = {
        "logits": [1.0] + [0.0] * 99,
        "certified": None,
        "refuted": {"eps": 0.1, "margins": [0.9] * 50 + [None] + [0.9] * 48},
    }
    kept = claims.compact(evidence)
    assert kept["refuted"]["margins"]["smallest"]["51"] is None
    assert claims.ibp(kept, {"norm": "linf", "precision": "float64"}).radius == 0.0
    emptied = {**kept, "refuted": {"eps": 0.1, "margins": {"of": 99, "smallest": {}}}}
    assert claims.ibp(emptied, {"norm": "linf", "precision": "float64"}).radius == 0.0


def test_etb_never_claims_more_than_an_estimate():
    evidence = {"logits": [1.0, 0.0], "certified": {"eps": 0.1, "margins": [0.5]}, "refuted": None}
    parameters = {"norm": "linf", "dtype": "float64", "variant": "whole"}
    assert not claims.etb(evidence, parameters).guarantee.certifies
    assert claims.etb(evidence, parameters).rule.endswith("(whole)")
    assert claims.sound_etb(evidence, parameters).guarantee.certifies


def test_claims_import_no_torch():
    code = "import sys, rsplugins.lirpa.claims; sys.exit('torch' in sys.modules or 'auto_LiRPA' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
