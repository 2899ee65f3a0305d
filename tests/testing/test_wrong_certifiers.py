"""The contract catches certifiers that are wrong, and passes the one that is not."""

from __future__ import annotations

import pytest

from rsplugins import CertifierDescriptor, Guarantee, Norm
from rsplugins.host import Entry
from rsplugins.testing import certifier_checks

CLAIMS = {
    "TimesOnePointOne": "times_one_point_one",
    "PpfAndCdfSwapped": "ppf_and_cdf_swapped",
    "PeekingUntilItCertifies": "best_look",
    "PatchNoiseUndivided": "patches",
    "MaxAndOneMinusP": "complement",
    "PowerIteration": "margin",
}


def entry(name: str) -> Entry:
    descriptor = CertifierDescriptor(
        name=name.lower(),
        summary="wrong",
        factory=f"tests.testing.wrong_certifiers:{name}",
        claim=f"tests.testing.wrong_claims:{CLAIMS.get(name, 'right')}",
        guarantee=Guarantee.DETERMINISTIC if name == "PowerIteration" else Guarantee.PROBABILISTIC,
        norms=(Norm.L2,),
    )
    return Entry(name.lower(), "certifier", "wrong", "wrong", "1.0", descriptor=descriptor)


def outcomes(name: str, only: str = "", **arguments):
    return [check.outcome() for check in certifier_checks(entry(name), **arguments) if only in check.name]


@pytest.mark.parametrize(
    ("name", "caught_by", "about"),
    [
        ("TimesOnePointOne", "soundness: half-space, 4 pixels", None),
        ("NormalisationForgotten", "soundness: half-space, normalised inside", None),
        ("SelectionReused", "soundness: ties", None),
        ("PpfAndCdfSwapped", "soundness: half-space, 4 pixels", None),
        ("ResizeIgnored", "soundness: half-space, resized inside", None),
        ("PatchNoiseUndivided", "soundness: half-space, even weights", "own"),
        ("MaxAndOneMinusP", "soundness: ties", "own"),
        ("PowerIteration", "soundness: half-space, stretched before", None),
        ("PeekingUntilItCertifies", "soundness: ties", None),
        ("SigmaAsVariance", "soundness: half-space, 4 pixels", None),
        ("BatchNoise", "batches and order", None),
    ],
)
def test_a_wrong_certifier_is_caught(name, caught_by, about):
    (outcome,) = outcomes(name, caught_by, about=about)
    assert outcome.status == "failed", outcome
    assert "false" in outcome.detail or "batches" in outcome.detail


@pytest.mark.parametrize("name", ["NormalisationForgotten", "ResizeIgnored"])
def test_a_mistake_shows_only_where_it_matters(name):
    (outcome,) = outcomes(name, "soundness: half-space, 4 pixels")
    assert outcome.status == "passed", outcome


def test_the_same_certifier_without_a_mistake_passes():
    found = outcomes("Right")
    assert [(outcome.name, outcome.detail) for outcome in found if outcome.status == "failed"] == []
    assert sum(outcome.status == "passed" for outcome in found) >= len(found) - 1
