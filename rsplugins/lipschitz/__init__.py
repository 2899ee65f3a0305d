"""Sound upper bounds of Lipschitz constants (l2 to l2), cuts into encoder and head, and orthogonal encoders.

Every bound here is an upper bound by proof, computed in float64 and rounded up; nothing rests on power iteration, which bounds
from below. The bounds are about the real function that the weights define: rounding inside the network itself is not covered
("float-idealised").

The names are imported on first use: ``rsplugins.lipschitz.claims`` is read where there is no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsplugins.lipschitz.analysis import Analysis, analyse, lipschitz_bound
    from rsplugins.lipschitz.convolution import convolution_norm
    from rsplugins.lipschitz.norms import matrix_norm
    from rsplugins.lipschitz.orthogonal import orthogonal_network, plain
    from rsplugins.lipschitz.rules import UnsupportedLayerError
    from rsplugins.lipschitz.split import Split, split_at

_HOMES = {
    "Analysis": "analysis",
    "Split": "split",
    "UnsupportedLayerError": "rules",
    "analyse": "analysis",
    "convolution_norm": "convolution",
    "lipschitz_bound": "analysis",
    "matrix_norm": "norms",
    "orthogonal_network": "orthogonal",
    "plain": "orthogonal",
    "split_at": "split",
}

__all__ = [
    "Analysis",
    "Split",
    "UnsupportedLayerError",
    "analyse",
    "convolution_norm",
    "lipschitz_bound",
    "matrix_norm",
    "orthogonal_network",
    "plain",
    "split_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rsplugins.lipschitz' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"rsplugins.lipschitz.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
