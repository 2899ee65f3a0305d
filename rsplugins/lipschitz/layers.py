"""Which layers have a rule, and whether one computes what its class says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsplugins.chain import computes_as
from rsplugins.lipschitz.tables import MODULES

_MAX_MIN = ("rsplugins.lipschitz.orthogonal.MaxMin", "orthogonium.layers.custom_activations.MaxMin")
"""Sorting pairs is a permutation on each of finitely many pieces and continuous, hence 1-Lipschitz."""


def is_known_module(module: nn.Module) -> bool:
    """Return whether a module is bounded as a whole: its forward is that of a layer with a rule."""
    return known_kind(module) is not None or is_max_min(module)


def is_restless(network: nn.Module) -> bool:
    """Return whether a network has a layer whose weight changes when it is read again."""
    return any(known_kind(module) is not None and changes_when_read(module) for module in network.modules())


def known_kind(module: nn.Module) -> type[nn.Module] | None:
    """Return the class with a rule whose forward a module runs, or None."""
    # A subclass that keeps forward (a parametrised layer, say) computes the same function; one that overrides it may not.
    kind = next((kind for kind in type(module).__mro__ if kind in MODULES), None)
    return kind if kind is not None and computes_as(module, kind, "_conv_forward", weight_hooks=True) else None


def is_max_min(module: nn.Module) -> bool:
    """Return whether a module sorts pairs of channels."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name in _MAX_MIN and computes_as(module, type(module), weight_hooks=True)


def changes_when_read(module: nn.Module, readings: int = 5) -> bool:
    """Return whether a layer's weight changes when it is read again."""
    first: Tensor | None = getattr(module, "weight", None)
    for _ in range(readings):
        again: Tensor | None = getattr(module, "weight", None)
        if first is None or again is None or again is first:
            return False
        if not torch.allclose(first, again, rtol=0.0, atol=0.0, equal_nan=True):
            return True
    return False
