"""Gaussian moments through networks: rules for auto-LiRPA's operators, representations of covariance, estimated radii.

Importing this loads nothing: ``MomentNetwork`` and the representations load torch when they are first asked for, so that the
claims of this room can be read without it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Channel": "channel",
    "Full": "full",
    "LogitGaussian": "network",
    "LowRank": "low_rank",
    "MomentNetwork": "network",
    "Pairs": "pairs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rsplugins.moments.{_HOMES[name]}"), name)
