"""A pretended Apple GPU: CPU tensors that say they are elsewhere, and refuse float64 and other devices' tensors, as those do.

They say that they are on ``meta``, since torch without its backend aborts at a tensor on ``mps``. What is not here is that
backend: which of its kernels exist, and how they round.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class OnMps(torch.Tensor):
    """A tensor of the pretended device, around one of the CPU."""

    @staticmethod
    def __new__(cls, held):
        assert type(held) is torch.Tensor
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        kept = {"dtype": held.dtype, "device": DEVICE, "strides": held.stride(), "storage_offset": held.storage_offset()}
        with torch.inference_mode(held.is_inference()):  # a view of a tensor from outside that mode is none of the mode's
            made = torch.Tensor._make_wrapper_subclass(cls, held.shape, requires_grad=False, **kept)
        made.held = held
        return made

    def __repr__(self):
        return f"OnMps({self.held})"

    def __deepcopy__(self, memo):
        copied = OnMps(self.held.detach().clone())
        made = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = made
        return made

    def __getitem__(self, index):
        # torch would put the indices of a list on the device, where no kernel is.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operator on what the tensors hold, and put the results on the device where they belong."""
    leaves = tree_flatten((args, kwargs))[0]
    here = any(isinstance(leaf, OnMps) for leaf in leaves)
    target = kwargs.get("device")
    there = torch.device(target).type if target is not None else None
    moving = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if moving and here and kwargs.get("dtype") == torch.float64:
        raise TypeError("cast to float64 while it moves from mps")
    strangers = [leaf for leaf in leaves if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.dim() > 0]
    if here and strangers and not moving and "index" not in str(func):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found mps and cpu ({func})")
    plain = {**kwargs, "device": torch.device("cpu")} if there == "meta" else kwargs
    found = func(*tree_map(unwrapped, args), **tree_map(unwrapped, plain))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if str(func).split(".")[1].endswith("_") and here:  # in place: the wrapper stays
        return args[0] if isinstance(args[0], OnMps) else found
    on_device = there == "meta" or (here and there is None)
    return tree_map(lambda leaf: OnMps(leaf) if type(leaf) is torch.Tensor else leaf, found) if on_device else found


def unwrapped(leaf):
    return leaf.held if isinstance(leaf, OnMps) else leaf


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def to_mps(module):
    """Put a module's numbers on the pretended device, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(OnMps(value.detach().clone()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = OnMps(value.detach().clone())
    return module


_FACTORIES = ("zeros", "ones", "empty", "full", "eye", "arange", "tensor", "as_tensor", "rand", "randn", "linspace")


def _makes(original):
    def factory(*arguments, **keywords):
        if "device" in keywords and torch.device(keywords["device"] or "cpu") == DEVICE:
            return OnMps(original(*arguments, **{**keywords, "device": "cpu"}))
        return original(*arguments, **keywords)

    return factory


def _moves(original):
    def to(self, *arguments, **keywords):
        target = next((each for each in (*arguments, keywords.get("device")) if isinstance(each, (str, torch.device))), None)
        given = arguments
        if arguments and isinstance(arguments[0], torch.Tensor):
            target, arguments = arguments[0].device, (arguments[0].dtype,)
        if target is None or torch.device(target) != DEVICE or isinstance(self, OnMps):
            return original(self, *given, **keywords)
        dtypes = [each for each in (*arguments, keywords.get("dtype")) if isinstance(each, torch.dtype)]
        if self.dtype == torch.float64 and dtypes:
            raise TypeError("cast from float64 while it moves to mps")
        return OnMps(original(self.detach(), *dtypes).clone())

    return to


@contextlib.contextmanager
def pretended(monkeypatch):
    """Let tensors be made on the pretended device, with generators of the CPU's, and have rsplugins know that it has no float64.

    By patches and not by a mode, which a tracer would not see through.
    """
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr("rsplugins.double.has_double", lambda device: device.type != DEVICE.type)
        for name in _FACTORIES:
            patch.setattr(torch, name, _makes(getattr(torch, name)))
        patch.setattr(torch.Tensor, "to", _moves(torch.Tensor.to))
        yield
