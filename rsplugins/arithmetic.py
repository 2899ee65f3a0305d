"""In which arithmetic torch computes: full precision where a claim rests on a slack of rounding, and in words elsewhere.

A float32 product is not what it says where the backend may round its factors: to 10 bits (TF32: cuDNN's convolutions by default,
matrix products when asked), to 7 (oneDNN's bf16 on a CPU), or under autocast. Their relative error of 5e-4 and more is far above
the slacks of bounds in float32 (1e-5), so bounds are computed inside :func:`full_precision`. Sampling certifies the function as
it is run, and :func:`spoken` is what a record says of that.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_BACKENDS = {"cuda": ("matmul", "conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
_OPERATIONS = {"conv": "convolutions", "matmul": "matrix products", "rnn": "recurrent layers"}
_REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")

_lock = threading.RLock()
_undo: list[Callable[[], object]] = []
_inside = 0


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute in the dtypes that the tensors have, whatever the caller allowed: no TF32, no oneDNN bf16, no autocast.

    Also a decorator. torch keeps these settings for the whole process, so other threads compute in full precision meanwhile; the
    last one to leave puts back what the first one found. Autocast belongs to each thread.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    with without_autocast():
        _enter()
        try:
            yield
        finally:
            _leave()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the autocast that a caller is in, on every kind of device."""
    with contextlib.ExitStack() as stack:
        for kind in _AUTOCAST:
            if _autocasts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def spoken(device: torch.device | str, dtype: torch.dtype | str, *, autocast: bool = False) -> str:
    """Return in words in which arithmetic a model runs now.

    Args:
        device: where it lies.
        dtype: of its weights.
        autocast: whether it runs under bfloat16 autocast.

    Example:
        >>> with full_precision():
        ...     spoken("cuda", torch.float32), spoken("cpu", torch.float64), spoken("cpu", torch.float32, autocast=True)
        ('float32, full precision', 'float64, full precision', 'bfloat16 autocast over float32, full precision')
    """
    name = str(dtype).removeprefix("torch.")
    shortened = ", ".join(_shortened(torch.device(device).type)) if name == "float32" else ""
    return f"{'bfloat16 autocast over ' if autocast else ''}{name}, {shortened or 'full precision'}"


def _shortened(kind: str) -> Iterator[str]:
    """Yield which operations on float32 may round their factors, by what to."""
    by_format: dict[str, list[str]] = {}
    for operation, words in _OPERATIONS.items():
        found = _allowed(kind, operation)
        if found in ("tf32", "bf16"):
            by_format.setdefault(found, []).append(words)
    for short, operations in by_format.items():
        yield f"{short} allowed in {' and '.join(operations)}"


def _allowed(kind: str, operation: str) -> str:
    if kind not in ("cpu", "cuda", "xpu"):
        return "none"
    if _has_precisions():
        return str(torch._C._get_fp32_precision_getter("cuda" if kind == "cuda" else "mkldnn", operation))
    if operation == "matmul":
        short = {"highest": "none", "high": "tf32", "medium": "tf32" if kind == "cuda" else "bf16"}
        return short[torch.get_float32_matmul_precision()]
    return "tf32" if kind == "cuda" and torch.backends.cudnn.allow_tf32 else "none"


def _autocasts(kind: str) -> bool:
    try:
        return bool(torch.is_autocast_enabled(kind))
    except TypeError:  # torch up to 2.3 has a function for each
        return bool({"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}.get(kind, bool)())
    except RuntimeError:  # a kind of device that this build does not know
        return False


def _enter() -> None:
    global _inside
    with _lock:
        if _inside == 0:
            try:
                _force()
            except BaseException:
                _restore()
                raise
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _restore()


def _restore() -> None:
    while _undo:
        _undo.pop()()


def _force() -> None:
    """Set everything to full precision, and note how it was. What is noted first is put back last."""
    products, convolutions = _said(torch.get_float32_matmul_precision), _said(lambda: torch.backends.cudnn.allow_tf32)
    if _has_precisions():
        _note_precisions()  # the older settings write into these, so these are put back after them
    # A setting that cannot be read was mixed with the newer ones, which then are the ones that count.
    if products not in (None, "highest"):
        _undo.append(partial(torch.set_float32_matmul_precision, products))
        torch.set_float32_matmul_precision("highest")
    if convolutions:
        _change(torch.backends.cudnn, "allow_tf32", False, before=True)
    if _has_precisions():
        for backend, operation in (("generic", "all"), *_leaves()):
            _precision(backend, operation, "ieee")
    matmul: Any = torch.backends.cuda.matmul
    for name in _REDUCTIONS:
        before = _said(partial(getattr, matmul, name))
        if before:
            both = _said(partial(getattr, matmul, f"{name}_split_k"))
            _change(matmul, name, False, before=before if both is None else (before, both))


def _note_precisions() -> None:
    """Note the precision of every backend and operation as it was set, not as it is inherited.

    One that is not set is read as that of its parent; with the parents unset, each is read as itself.
    """
    for backend, operation in (("generic", "all"), *((name, "all") for name in _BACKENDS), *_leaves()):
        own = str(torch._C._get_fp32_precision_getter(backend, operation))
        _undo.insert(0, partial(_precision, backend, operation, own))
        if operation == "all":
            _precision(backend, operation, "none")


def _leaves() -> Iterator[tuple[str, str]]:
    for backend, operations in _BACKENDS.items():
        for operation in operations:
            yield backend, operation


def _precision(backend: str, operation: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, value)


def _has_precisions() -> bool:
    return hasattr(torch._C, "_set_fp32_precision_setter")  # since torch 2.9


def _change(where: Any, name: str, value: object, *, before: object) -> None:
    _undo.append(partial(setattr, where, name, before))
    setattr(where, name, value)


def _said(read: Callable[[], Any]) -> Any:
    """Read a setting; None where there is none, or where torch refuses to say."""
    try:
        return read()
    except (RuntimeError, AttributeError):
        return None


def growth(count: int, dtype: torch.dtype) -> float:
    """Return gamma_n with some of its own rounding: infinite where the format is too coarse for so long a sum.

    Example:
        >>> growth(100, torch.float64) < 1.2e-14, growth(10**8, torch.float32)
        (True, inf)
    """
    part = count * torch.finfo(dtype).eps / 2
    return part / (1 - 8 * part) if part < 0.1 else math.inf


def rounding_error(count: int, magnitude: Tensor) -> Tensor:
    """Return the rounding error of values with ``count`` roundings behind them; underflow adds at most a normal number each."""
    return growth(count, magnitude.dtype) * magnitude + count * torch.finfo(magnitude.dtype).tiny
