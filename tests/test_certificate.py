"""Certificates say what they are, and never print more than was proven."""

import pytest

from rsplugins.certificate import Certificate, Guarantee, Norm


def certificate(**changes):
    values = {
        "index": 4,
        "method": "gaussian",
        "prediction": 3,
        "radius": 0.7046619,
        "guarantee": Guarantee.PROBABILISTIC,
        "norm": Norm.L2,
        "alpha": 0.001,
        "samples": 10_100,
        "seconds": 0.1,
        "evidence": {},
    }
    return Certificate(**{**values, **changes})


def test_only_proven_radii_are_called_certified():
    assert str(certificate()) == "input 4: class 3, certified l2 radius 0.704661 (probabilistic, alpha=0.001)"
    estimate = str(certificate(guarantee=Guarantee.ESTIMATE, alpha=None))
    assert "certified" not in estimate
    assert "estimate l2 radius" in estimate


@pytest.mark.parametrize("radius", [0.9999999, 0.95287812, 1e-7, 0.3, 3.8115])
def test_printed_radii_are_rounded_down(radius):
    printed = float(str(certificate(radius=radius)).split("radius ")[1].split()[0])
    assert radius - 1e-6 < printed <= radius


def test_abstained_is_not_failed():
    abstained, failed = certificate(prediction=None, radius=0.0), certificate(prediction=None, radius=0.0, error="damaged file")
    assert (abstained.abstained, failed.abstained) == (True, False)
    assert "abstains" in str(abstained)
    assert "failed: damaged file" in str(failed)


def test_a_radius_of_zero_is_no_certified_radius():
    none = certificate(radius=0.0, guarantee=Guarantee.DETERMINISTIC, alpha=None)
    assert str(none) == "input 4: class 3, no certified l2 radius (deterministic)"
