"""What moves, selects or repeats entries: how often each appears is read off the call itself, carried out on their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rsplugins.lipschitz.arguments import Call, NoBoundError, Shape
from rsplugins.lipschitz.composition import Value
from rsplugins.lipschitz.norms import up


def root(count: int) -> float:
    """Return the root of a count, rounded up unless it is whole."""
    whole = math.isqrt(count)
    return float(whole) if whole * whole == count else up(math.sqrt(count))


def repeats(shape: Shape, out: Shape) -> float:
    """Return the factor of broadcasting: the root of how often each entry appears."""
    return root(max(1, math.prod(out) // max(1, math.prod(shape))))


def copies(run: Callable[[Tensor], Any], shape: Shape) -> int:
    """Return how often a call puts the entry that it shows most often into its results.

    The call runs on a tensor that holds the entries' numbers, so that all its arguments count as PyTorch takes them. It runs on
    them a second time with a constant added: an entry of a result has to follow by just that, or not at all, as padding does.

    Raises:
        NoBoundError: an entry of a result is neither one of the entries nor a constant.

    Example:
        >>> copies(lambda x: x.tensor_split([3, 1], 0), (4,))
        2
    """
    size = math.prod(shape)
    numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(shape)
    counts = torch.zeros(size + 1, dtype=torch.int64)
    for first, second in zip(_tensors(run(numbers.clone())), _tensors(run(numbers + size)), strict=True):
        moved = first != second
        numbered = first[moved]
        whole = (second[moved] - numbered == size) & (numbered >= 1) & (numbered <= size) & (numbered == numbered.round())
        if not bool(whole.all()):
            raise NoBoundError("it does more than move, select or repeat entries")
        counts += torch.bincount(numbered.long(), minlength=size + 1)
    return int(counts.max())


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
        return
    if not isinstance(result, (tuple, list)):
        raise NoBoundError("it returns something else than tensors")
    for part in result:
        yield from _tensors(part)


def move(call: Call) -> Value:
    """Bound what moves, selects or repeats entries by the root of how often one appears in the results together."""
    value, shape = call.source()
    for name in call.given():
        if name == "out" or (name != "input" and isinstance(call.constant(name), torch.dtype)):
            what = "writes into a tensor that it is given" if name == "out" else "reads the bits of a tensor as another type"
            raise NoBoundError(f"{call.name} {what} ({name})")
    return value.through(root(copies(call.run, shape)))


def getitem(call: Call) -> Value:
    """Bound an index: of a tensor as what selects entries, of a tuple as what takes some of its parts."""
    source = call.arguments["input"]
    if call.info[source].shape is not None:
        return move(call)
    call.read.add("input")
    if not isinstance(call.constant("index"), (int, slice)):
        raise NoBoundError("it selects parts of a tuple by something else than a number or a slice")
    return call.values[source].through(1.0)


def keep(call: Call) -> Value:
    """Bound a copy, with another format in memory or as float32 or float64."""
    value, _ = call.source()
    call.ignore("memory_format")
    return value.through(1.0)
