"""The plugin: hooks only, nothing heavy."""

from __future__ import annotations

import rsplugins

RSPLUGINS_API = 1


@rsplugins.hookimpl
def rsplugins_certifiers() -> list[rsplugins.CertifierDescriptor]:
    """Bring the certifier ``uniform-l1``."""
    return [
        rsplugins.CertifierDescriptor(
            name="uniform-l1",
            summary="l1 radii from uniform noise (Lee et al. 2019)",
            factory="rsplugins_uniform_l1.certifier:UniformL1",
            claim="rsplugins_uniform_l1.claim:claim",
            guarantee=rsplugins.Guarantee.PROBABILISTIC,
            norms=(rsplugins.Norm.L1,),
        )
    ]
