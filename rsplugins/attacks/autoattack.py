"""AutoAttack (Croce and Hein, ICML 2020), under either of the names that it is installed by."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rsplugins.errors import ParameterError, PluginUnavailableError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's standard version."""
KNOWN = frozenset((*STANDARD, "apgd-dlr", "fab"))
_NAMES = ("pyautoattack", "autoattack")


def has_autoattack() -> bool:
    """Whether AutoAttack is installed."""
    return any(importlib.util.find_spec(name) is not None for name in _NAMES)


def autoattack_versions() -> dict[str, str]:
    """Return the versions of the distributions that bring it."""
    found = {}
    for name in _NAMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_autoattack(attacks: Sequence[str], num_classes: int) -> None:
    """Check that some attacks of AutoAttack can run here on a model with that many classes.

    Raises:
        PluginUnavailableError: AutoAttack is not installed.
        ParameterError: too few classes for the DLR loss.
    """
    if not attacks:
        return
    if not has_autoattack():
        raise PluginUnavailableError(
            "AutoAttack is not installed.",
            fix='pip install "pyautoattack>=0.2"; or leave it out with --autoattack none, and do not trust PGD alone.',
        )
    if num_classes < 4 and any(name in ("apgd-t", "apgd-dlr") for name in attacks):
        raise ParameterError(
            f"AutoAttack's DLR loss needs at least 4 classes; the model has {num_classes}.",
            fix="Use --autoattack apgd-ce,fab,square.",
        )


def adversary(
    model: nn.Module, attacks: Sequence[str], *, eps: float, num_classes: int, batch: int, seed: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from images (B, C, H, W) and labels (B,) to attacked images.

    Args:
        model: raw [0, 1] pixels to logits.
        attacks: by name, in order.
        eps: l-infinity, raw pixels.
        num_classes: K.
        batch: inputs at a time; its coins depend on it.
        seed: of its coins.
        device: of the images.

    Raises:
        PluginUnavailableError, ParameterError: see :func:`check_autoattack`.
    """
    from rsplugins.compat import alias_autoattack

    check_autoattack(attacks, num_classes)
    alias_autoattack()
    from autoattack import AutoAttack

    # pyautoattack and the original name it differently.
    signature = inspect.signature(AutoAttack.run_standard_evaluation)
    keyword = "batch_size" if "batch_size" in signature.parameters else "bs"
    made = AutoAttack(model, norm="Linf", eps=eps, seed=seed, version="standard", device=device)
    made.verbose = False
    made.attacks_to_run = list(attacks)
    # The standard version attacks 9 target classes; a model with fewer has fewer.
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(9, num_classes - 1)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        result = made.run_standard_evaluation(images, labels, **{keyword: batch})
        attacked: Tensor = result[0] if isinstance(result, tuple) else result
        return attacked

    return run
