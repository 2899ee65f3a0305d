"""Which device work is done on, by name, and what its errors mean."""

from __future__ import annotations

import os

import torch

from rsplugins.errors import ParameterError

_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of a name; none, or ``"auto"``, is a GPU when there is one. Ranks of torchrun take a GPU each.

    Raises:
        ParameterError: not a device, or not on this machine.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(str(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).splitlines()[0]
        raise ParameterError(
            f"The device {name!r} cannot be used: {text}",
            fix="Use auto, cpu, cuda or cuda:1; `rsplugins doctor` lists the devices.",
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """Return ``"cpu"``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _NO_MEMORY)
