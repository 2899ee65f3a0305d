"""Certified robustness for pretrained classifiers: wrap a model, certify it with any plugin, know exactly what is guaranteed.

The names below are the public door. They load lazily, so that ``import rsplugins`` and ``rsplugins plugins list`` need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsplugins import data
    from rsplugins.api import attack, certify, load_data, open_run
    from rsplugins.certificate import Certificate, Claim, Evidence, Gathered, Guarantee, Norm, Threat
    from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input
    from rsplugins.classifier import Classifier, wrap
    from rsplugins.denoising.door import denoise
    from rsplugins.errors import RspluginsError
    from rsplugins.host import (
        BoundOperatorDescriptor,
        CertifierDescriptor,
        DatasetDescriptor,
        DenoiserDescriptor,
        ModelSourceDescriptor,
        MomentRuleDescriptor,
        TrainingHookDescriptor,
        hookimpl,
    )
    from rsplugins.models import load
    from rsplugins.runs.run import Run
    from rsplugins.runs.summary import score

_HOMES = {
    "BoundOperatorDescriptor": "rsplugins.host",
    "Certificate": "rsplugins.certificate",
    "Certifier": "rsplugins.certifier",
    "CertifierDescriptor": "rsplugins.host",
    "CertifierParameters": "rsplugins.certifier",
    "Claim": "rsplugins.certificate",
    "Classifier": "rsplugins.classifier",
    "DatasetDescriptor": "rsplugins.host",
    "DenoiserDescriptor": "rsplugins.host",
    "Evidence": "rsplugins.certificate",
    "Execution": "rsplugins.certifier",
    "Gathered": "rsplugins.certificate",
    "Guarantee": "rsplugins.certificate",
    "Input": "rsplugins.certifier",
    "ModelSourceDescriptor": "rsplugins.host",
    "MomentRuleDescriptor": "rsplugins.host",
    "Norm": "rsplugins.certificate",
    "RspluginsError": "rsplugins.errors",
    "Threat": "rsplugins.certificate",
    "Run": "rsplugins.runs.run",
    "TrainingHookDescriptor": "rsplugins.host",
    "attack": "rsplugins.api",
    "certify": "rsplugins.api",
    "denoise": "rsplugins.denoising.door",
    "hookimpl": "rsplugins.host",
    "load": "rsplugins.models",
    "load_data": "rsplugins.api",
    "open_run": "rsplugins.api",
    "score": "rsplugins.runs.summary",
    "wrap": "rsplugins.classifier",
}

__all__ = [  # noqa: RUF022 -- the order a reader meets them in
    "wrap",
    "load",
    "load_data",
    "denoise",
    "certify",
    "open_run",
    "score",
    "attack",
    "data",
    "Run",
    "Classifier",
    "Certificate",
    "Claim",
    "Evidence",
    "Gathered",
    "Guarantee",
    "Norm",
    "Threat",
    "Certifier",
    "CertifierParameters",
    "Execution",
    "Input",
    "hookimpl",
    "CertifierDescriptor",
    "ModelSourceDescriptor",
    "DatasetDescriptor",
    "BoundOperatorDescriptor",
    "DenoiserDescriptor",
    "MomentRuleDescriptor",
    "TrainingHookDescriptor",
    "RspluginsError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from rsplugins.provenance import version

        return version()
    import importlib

    if name == "data":
        return importlib.import_module("rsplugins.data")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rsplugins' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
