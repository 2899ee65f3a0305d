"""float64 on devices that have none: what needs it is computed on the CPU.

Apple's GPUs (mps) have no float64, nor have some of Intel's (xpu): a tensor there cannot be cast to it, and one that is cast
while it moves is cast on whichever side the backend likes. So a tensor moves before it widens, and narrows before it moves.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from rsplugins.errors import InputValueError, UsageError

Network = TypeVar("Network", bound=nn.Module)
_CPU = torch.device("cpu")


def has_double(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def home(device: torch.device, dtype: torch.dtype) -> torch.device:
    """Return where numbers of a dtype can live: the device, or the CPU."""
    return device if dtype != torch.float64 or has_double(device) else _CPU


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device or on the CPU.

    Example:
        >>> double(torch.zeros(2)).dtype
        torch.float64
    """
    return tensor.to(home(tensor.device, torch.float64)).double()


def bring(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device in a dtype that the device has.

    Example:
        >>> bring(torch.zeros(2, dtype=torch.float64), torch.device("cpu"), torch.float32).dtype
        torch.float32
    """
    if has_double(tensor.device) and has_double(device):
        return tensor.to(device, dtype)
    return tensor.to(dtype).to(device) if has_double(tensor.device) else tensor.to(device).to(dtype)


def copied(module: Network) -> Network:
    """Return a deep copy, to be cast or analysed apart from the caller's own layers, which may count or cache.

    Raises:
        UsageError: a part of it cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise UsageError(
            f"The model cannot be copied, so it is not analysed: {type(error).__name__}: {str(error).split('. ')[0]}",
            cause="a layer keeps something that copy.deepcopy refuses: a lock, a file, a nested tensor, or a tensor that has a "
            "gradient history.",
            fix="Remove it, or give its class a __deepcopy__; weights computed by a hook can be copied after a pass under "
            "torch.no_grad(). A certifier that only samples, such as 'gaussian', takes the model as it is.",
        ) from error


def brought(module: Network, dtype: torch.dtype) -> Network:
    """Move a module to where its numbers can have a dtype, and cast them; in place, as ``module.to`` does."""
    first = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    if first is not None:
        module.to(home(first.device, dtype))
    return module.to(dtype)


def arrived(image: Tensor, device: torch.device) -> Tensor:
    """Return a user's image on a device, as it is.

    Raises:
        InputValueError: float64, where the device has none: rounded, it would be another image than the one that is certified.
    """
    if image.dtype == torch.float64 and not has_double(device):
        raise InputValueError(
            f"The images are float64, which {device.type} does not have.",
            cause="rounded there, they would be other images than those that you hold.",
            fix="Round them yourself, images.float(), or move the model to the CPU.",
        )
    return image.to(device)


def sizes(tensor: Tensor) -> tuple[object, ...]:
    """Return the shape of a tensor; of a nested one, which has none or one of its own making, those of its parts."""
    return tuple(tuple(part.shape) for part in tensor.unbind()) if tensor.is_nested else tuple(tensor.shape)


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the dense tensors that hold all of a tensor: itself, or the parts of a nested, sparse or quantised one."""
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.is_quantized:
        channels = "channel" in str(tensor.qscheme())
        scales = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()) if channels else ()
        return tensor.int_repr(), *(
            scales or (torch.tensor([tensor.q_scale(), float(tensor.q_zero_point())], dtype=torch.float64),)
        )
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor if tensor.layout is torch.strided else tensor.to_dense(),)
