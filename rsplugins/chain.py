"""Networks that are a chain of affine layers and ReLUs: what can be bounded and propagated without a tracer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rsplugins.classifier import Classifier

IN_CHAIN = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Identity)
"""The layers that a chain may have."""


def leaves(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers without children; of a Classifier, its network's. One that stands in two places comes twice.

    Example:
        >>> relu = nn.ReLU()
        >>> len(list(leaves(nn.Sequential(relu, nn.Sequential(nn.Linear(2, 2), relu)))))
        3
    """
    children = [model.module] if isinstance(model, Classifier) else list(model._modules.values())
    if not children:
        yield model
    for child in children:
        if child is not None:
            yield from leaves(child)


def stray(model: nn.Module) -> str:
    """Return what keeps a model from being a chain, or nothing when it is one.

    Example:
        >>> stray(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        ''
        >>> stray(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
        'Tanh'
    """
    layer = next((layer for layer in leaves(model) if not _is(layer, IN_CHAIN)), None)
    if layer is not None:
        return type(layer).__name__
    return "" if _is_sequential(model) else "a forward() of its own"


def _is(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer computes what one of these does: a subclass or a hook may change that."""
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    parts = ("forward", "_conv_forward", "__call__")
    same = kind is not None and all(getattr(type(layer), part, None) is getattr(kind, part, None) for part in parts)
    return same and "forward" not in vars(layer) and not layer._forward_hooks and not layer._forward_pre_hooks


def _is_sequential(model: nn.Module) -> bool:
    """Whether forward is the chain of the layers: only Sequential says so of itself."""
    if isinstance(model, Classifier):
        return model.resize is None and _is_sequential(model.module)
    return _is(model, IN_CHAIN) or (
        isinstance(model, nn.Sequential) and _is(model, (nn.Sequential,)) and all(map(_is_sequential, model))
    )
