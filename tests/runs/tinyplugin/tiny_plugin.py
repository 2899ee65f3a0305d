"""A small third-party plugin with known answers: a linear model, random images, certifiers that need no engine.

Tests install it for themselves or for a subprocess with the fixtures in tests/runs/conftest.py.
"""

from __future__ import annotations

import rsplugins

RSPLUGINS_API = 1


@rsplugins.hookimpl
def rsplugins_certifiers():
    certified, estimate = rsplugins.Guarantee.PROBABILISTIC, rsplugins.Guarantee.ESTIMATE
    common = {"norms": (rsplugins.Norm.L2,)}

    def certifier(name, factory, claim, guarantee, **more):
        return rsplugins.CertifierDescriptor(
            name=name,
            summary=name,
            factory=f"tiny_certifiers:{factory}",
            claim=f"tiny_claims:{claim}",
            guarantee=guarantee,
            **common,
            **more,
        )

    return [
        certifier("votes", "Votes", "votes", certified),
        certifier("margin", "Margin", "margin", rsplugins.Guarantee.DETERMINISTIC),
        certifier("guess", "Guess", "guess", estimate),
        certifier("breaks", "Breaks", "margin", estimate, default=False),
        certifier("needy", "Margin", "margin", estimate, requires=("no-such-distribution>=1",)),
    ]


@rsplugins.hookimpl
def rsplugins_models():
    return [rsplugins.ModelSourceDescriptor(name="tiny", summary="a linear model", factory="tiny_certifiers:load_model")]


@rsplugins.hookimpl
def rsplugins_datasets():
    return [rsplugins.DatasetDescriptor(name="tiny", summary="random images", factory="tiny_certifiers:load_data")]
