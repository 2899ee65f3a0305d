"""Where bfloat16 cannot be trusted to train, and where it would only be slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsplugins.classifier import Classifier

_BATCH = 2
_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls units that multiply bfloat16: of x86 the first two, of ARM the last."""


def why_float32(classifier: Classifier, device: torch.device) -> str | None:
    """Return why a recipe's bfloat16 is not for this network on this device, or None where it is.

    Args:
        classifier: see :func:`unsafe_in_bfloat16`.
        device: where it will be trained.
    """
    unsafe = unsafe_in_bfloat16(classifier, device)
    if unsafe is not None:
        return f"{unsafe}, which this CPU's bfloat16 computes wrong gradients of"
    if has_bfloat16(device):
        return None
    return "this processor has no units for bfloat16, which it would only imitate, several times as slowly"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; a CPU that does not say so counts as one that does not.

    Without such units the kernels convert each number back and forth: a tenth of the speed of float32 was seen.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(answer is not None and answer() for answer in asked) or bool(_UNITS & _cpu_features())


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.partition(":")[2].split()}


def unsafe_in_bfloat16(classifier: Classifier, device: torch.device) -> str | None:
    """Return why a network must not be trained in bfloat16 on a device, or None.

    On a CPU, oneDNN leaves parts of a bfloat16 weight gradient unwritten (torch 2.15, AVX-512: values of 1e33 and NaN, the loss
    being fine) when a convolution is three-dimensional, or when its input is narrower than its stride. In one and two dimensions
    all sizes from 1 to 7 were tried; in three, an input of depth 2 fails at stride 1 too, so all are counted.

    Args:
        classifier: as it will be trained; run once on black images, without gradients, and left as it was.
        device: where it will be trained.
    """
    if device.type != "cpu" or classifier.input_size is None:
        return None
    seen = _Convolutions()
    was_training = [module for module in classifier.modules() if module.training]
    try:
        classifier.eval()  # batch statistics stay as they are
        with torch.no_grad(), seen:
            classifier(torch.zeros(_BATCH, *classifier.input_size))
    finally:
        _set_training(was_training)
    return seen.reason


def _set_training(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the convolutions that a network makes, by layer or by function."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            size, stride = tuple(args[0].shape[2:]), tuple(args[3])
            if len(size) == 3:
                self.reason = "it has three-dimensional convolutions"
            elif any(extent < by for extent, by in zip(size, stride * (len(size) // len(stride)), strict=True)):
                self.reason = f"a convolution of stride {stride} has an input of {' x '.join(map(str, size))}"
        return func(*args, **(kwargs or {}))
