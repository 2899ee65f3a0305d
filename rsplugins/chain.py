"""Networks that are a chain of affine layers and ReLUs: what can be bounded and propagated without a tracer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rsplugins.classifier import Classifier

IN_CHAIN = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Identity)
"""The layers that a chain may have."""

_CALLS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward")
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm)


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


def computes_as(module: nn.Module, kind: type[nn.Module], *parts: str, weight_hooks: bool = False) -> bool:
    """Return whether a module runs the methods of a class: a subclass, the object itself or a hook may change them.

    Args:
        module: any.
        kind: the class whose computation is known.
        parts: further methods that its forward calls.
        weight_hooks: whether hooks are allowed that only set a weight, the same at every pass in eval mode (weight and spectral
            normalisation in torch's old form): for those who read the weight after a pass.

    Example:
        >>> relu = nn.ReLU()
        >>> computes_as(relu, nn.ReLU)
        True
        >>> _ = relu.register_forward_hook(lambda module, x, y: y / 2)
        >>> computes_as(relu, nn.ReLU)
        False
    """
    same = all(
        getattr(type(module), part, None) is getattr(kind, part, None) and part not in vars(module) for part in (*_CALLS, *parts)
    )
    allowed = _WEIGHT_HOOKS if weight_hooks else ()
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook) not in allowed]
    return same and not hooks and not module._forward_hooks


def _is(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    return kind is not None and computes_as(layer, kind, "_conv_forward")


def _is_sequential(model: nn.Module) -> bool:
    """Whether forward is the chain of the layers: only Sequential says so of itself."""
    if isinstance(model, Classifier):
        return model.resize is None and _is_sequential(model.module)
    return _is(model, IN_CHAIN) or (
        isinstance(model, nn.Sequential) and _is(model, (nn.Sequential,)) and all(map(_is_sequential, model))
    )
