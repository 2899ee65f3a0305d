"""Follows the pixels through a forward pass, and stops it where Python would see their values or remember them.

What depends on pixels is known by its memory: every tensor operation that is given such memory marks what it returns or writes.
Operations are seen below autograd and inside composites and TorchScript, so none is missed; what reads memory without an
operation (``tolist``, ``numpy``, ``data_ptr``) is seen where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rsplugins.double import dense_parts, double, sizes
from rsplugins.errors import UsageError
from rsplugins.watch import lines
from rsplugins.watch.writes import Views, version

_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_READS_BY_NAME = {
    "is_nonzero", "_pack_padded_sequence", "to_sparse", "to_mkldnn", "_to_sparse", "set_", "set", "nonzero_static",
    "_assert_async", "_functional_assert_async", "_assert_scalar", "_functional_assert_scalar", "_linalg_check_errors",
    "cholesky", "linalg_eig", "sym_constrain_range",
}  # fmt: skip
"""Operations that look at values although no tag says so; the last ones fail for some values, which a ``try`` can branch on."""

ONLY_SHAPES = {
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
    "rand_like", "randn_like", "randint_like", "_shape_as_tensor", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset",
}  # fmt: skip
"""Operations whose result does not depend on the values that they are given."""

_CALLS = (
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__reduce_ex__",
    "__deepcopy__", "apply_", "map_", "map2_", "share_memory_", "item", "__bool__", "__int__", "__float__", "__index__",
    "__complex__", "__contains__", "set_", "__repr__", "__format__",
)  # fmt: skip
_ATTRIBUTES = ("data", "__cuda_array_interface__")


def _readers() -> dict[Any, str]:
    calls: dict[Any, str] = {getattr(Tensor, name): name for name in _CALLS if hasattr(Tensor, name)}
    for name in _ATTRIBUTES:
        attribute: Any = vars(Tensor).get(name) or vars(torch._C.TensorBase).get(name)
        calls |= {attribute.__get__: name, attribute.__set__: name} if hasattr(attribute, "__set__") else {}
        if isinstance(attribute, property):
            calls[attribute.__get__] = name
    return calls


_READERS = _readers()
_SPLITS = (torch.tensor_split, Tensor.tensor_split)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dictionaries and objects with plain attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def digest(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, dtype and two sums of each dense part, which tell different values apart.

    What gives no numbers, such as a tensor of a subclass that refuses, equals nothing, not even itself: a rule table is closed.
    """
    found: list[Any] = [str(tensor.dtype), str(tensor.layout)]
    try:
        found.append(sizes(tensor))
        if tensor.is_meta:  # of no values
            return tuple(found)
        for part in dense_parts(tensor.detach()):
            numbers = double(torch.view_as_real(part) if part.is_complex() else part).flatten()
            weights = torch.arange(1, len(numbers) + 1, device=numbers.device, dtype=torch.float64).sin_()
            found += [repr(float(numbers.sum())), repr(float(numbers @ weights))]
    except (RuntimeError, NotImplementedError):
        found.append(object())
    return tuple(found)


class Memory:
    """Which memory holds what depends on pixels, over several passes.

    Args:
        lasting: the model's own tensors, by the words for them.

    Attributes:
        round: number of the pass that is running.
        finding: the first refusal, kept because the model may swallow it.
    """

    def __init__(self, lasting: Iterable[tuple[str, Tensor]]) -> None:
        # A reference that does not keep memory alive, but keeps its name from being given to other memory.
        self._known: dict[int, StorageWeakRef] = {}
        self._marked: dict[int, int] = {}
        self._own: dict[int, int] = {}
        self.lasting: dict[int, str] = {}
        for said, tensor in lasting:
            key = self._key(tensor)
            if key is not None:
                self.lasting.setdefault(key, said)
        self.round = 0
        self.finding: UsageError | None = None

    def _key(self, tensor: Tensor) -> int | None:
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None
        key: int = storage._cdata
        if key not in self._known:
            self._known[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return key

    def made(self, tensor: Tensor, *, marked: bool) -> None:
        """Note memory that this pass made or wrote, and whether it depends on pixels."""
        key = self._key(tensor)
        if key is None:
            if marked:
                self.refuse(unfollowed("a layout without memory of its own, such as sparse"))
            return
        if key not in self.lasting:
            self._own.setdefault(key, self.round)
        if marked:
            self._marked[key] = self.round

    def depends(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on pixels, of this pass or an earlier one."""
        return self._key(tensor) in self._marked

    def is_lasting(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the model's own, from before the first pass."""
        return self._key(tensor) in self.lasting

    def named(self, tensor: Tensor) -> str:
        """Return the words for a tensor that outlives the pass."""
        said = self.lasting.get(self._key(tensor) or 0)
        return "a tensor that outlives the call" if said is None else f"{said}, which outlives the call,"

    def is_stale(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on pixels of an earlier pass."""
        return self._marked.get(self._key(tensor) or 0, self.round) != self.round

    def is_own(self, tensor: Tensor) -> bool:
        """Return whether this pass made the tensor's memory."""
        return self._own.get(self._key(tensor) or 0) == self.round

    def refuse(self, error: UsageError) -> None:
        """Raise an error, and remember it.

        Raises:
            UsageError: always.
        """
        self.finding = self.finding or error
        raise self.finding


INSTEAD = ", or use a certifier that runs the model itself, such as 'gaussian'."
"""How a fix ends where other certifiers do without the trace."""


def read(what: str) -> UsageError:
    """Return the refusal of a model that looks at pixels."""
    return UsageError(
        f"The model's forward looks at values that depend on pixels{lines.place(lines.current())}. Nothing was certified.",
        cause=f"{what}: a branch, an index, a count or a constant made from pixels is recorded for one image, and what is "
        "certified would be another function.",
        fix=f"Write it with tensor operations (torch.where, a product with a mask){INSTEAD}",
    )


def unfollowed(what: str) -> UsageError:
    """Return the refusal of what cannot be followed."""
    return UsageError(
        f"The model's forward cannot be followed{lines.place(lines.current())}. Nothing was certified.",
        cause=f"{what}.",
        fix=f"Write it with dense tensor operations{INSTEAD}",
    )


def restless(what: str, line: str, cause: str) -> UsageError:
    """Return the refusal of a model that is not a function of its input."""
    return UsageError(
        f"The model is random or has state: {what}{lines.place(line)}. Nothing was certified.",
        cause=cause,
        fix="Make forward() a function of its input alone.",
    )


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation; see the module.

    Args:
        memory: what is known so far.
        exact: note each operation's constants, for a comparison with another pass.
        fixed: refuse writes to tensors that outlive the pass although no pixel is written.
    """

    def __init__(self, memory: Memory, *, exact: bool, fixed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.exact, self.fixed = memory, exact, fixed
        self.seen: list[tuple[Any, ...]] = []
        self.places: list[str] = []
        self.failed = ""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Keep torch.compile out of what runs under this mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        # Our own look at tensors is none of the model's calls (TorchScript comes here with its modes still on).
        with torch._C.DisableTorchFunction():
            return self._operation(func, args, kwargs or {})

    def _operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = list(tensors((args, kwargs)))
        marked = [tensor for tensor in given if self.memory.depends(tensor)]
        if not isinstance(func, torch._ops.OpOverload):
            self.memory.refuse(unfollowed(f"{func} runs code of its own"))
        name = func._schema.name.partition("::")[2]
        if marked:
            self._check(func, name, args, marked)
            if self.exact:
                self._note(func, name, args, kwargs)
        written = list(_written(func, args, kwargs))
        if marked or self.fixed:
            self._check_written(written)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        before = _generators(given, kwargs) if draws else {}
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.failed = self.failed or (lines.current() if marked else "")
            raise
        after = _generators(given, kwargs) if draws else {}
        drawn = [said for said, state in before.items() if not torch.equal(state, after[said])]
        if drawn:
            cause = f"{name} draws random numbers in eval mode (F.dropout without training=self.training, say)."
            self.memory.refuse(restless(f"it draws from {drawn[0]}", lines.current(), cause))
        depends = bool(marked) and name not in ONLY_SHAPES
        for tensor in (*tensors(result), *written):
            self.memory.made(tensor, marked=depends)
        return result

    def _check(self, func: Any, name: str, args: Any, marked: list[Tensor]) -> None:
        if any(self.memory.is_stale(tensor) for tensor in marked):
            cause = "a tensor that an earlier call computed from its images is used: a running average, a cache."
            self.memory.refuse(restless("it uses values of an earlier call", lines.current(), cause))
        if name in _READS_BY_NAME or any(tag in func.tags for tag in _READS):
            chosen = list(tensors(args[1])) if name == "index" else marked
            masks = [t for t in chosen if t.dtype in (torch.bool, torch.uint8) and self.memory.depends(t)]
            if name != "index" or masks:
                self.memory.refuse(read(f"the operation {name}"))

    def _check_written(self, written: list[Tensor]) -> None:
        kept = [tensor for tensor in written if not self.memory.is_own(tensor)]
        if kept:
            cause = "a buffer, a parameter or a global tensor is changed by each call: a counter, a running average."
            self.memory.refuse(restless(f"it writes into {self.memory.named(kept[0])}", lines.current(), cause))

    def _note(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        constants: list[Any] = []

        def visit(value: Any) -> None:
            if isinstance(value, Tensor):
                if self.memory.depends(value):
                    constants.append("pixels")
                else:
                    constants.append("weights" if self.memory.is_lasting(value) else digest(value))
            elif isinstance(value, (tuple, list)):
                constants.append(len(value))
                for item in value:
                    visit(item)
            elif value is None or isinstance(value, (bool, int, float, str, complex)):
                constants.append(repr(value))

        overwritten = name == "copy_"  # what was there before, perhaps never set, is of no account
        visit((args[1:] if overwritten else args, tuple(value for key, value in kwargs.items() if key != "out")))
        self.seen.append((str(func), *constants))
        self.places.append(lines.current())


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes, apart from the stored statistics that batch normalisation leaves alone."""
    if "batch_norm" in func._schema.name and not any(value is True for value in (*args, *kwargs.values())):
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if place >= len(args) or argument.kwarg_only else args[place]
            yield from tensors(value)


def _generators(given: list[Tensor], kwargs: Any) -> dict[str, Tensor]:
    states = {"the random generator of torch": torch.get_rng_state()}
    for value in kwargs.values():
        if isinstance(value, torch.Generator):
            states["a torch.Generator of its own"] = value.get_state()
    for tensor in given[:1]:
        if tensor.is_cuda:
            states[f"the random generator of torch on {tensor.device}"] = torch.cuda.get_rng_state(tensor.device)
    return states


class Readings(TorchFunctionMode):
    """Sees the calls that read memory without an operation, and the writes that a later call sees through another tensor.

    Attributes:
        lost: the line of the first such write to memory that depends on pixels; None where there is none.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.views = Views()
        self.lost: str | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        name = _READERS.get(func)
        looked_at = (args, kwargs) if name is not None else ()
        if func in _SPLITS:
            name, looked_at = "tensor_split", (args[1:], kwargs)
        if name is not None and any(self.memory.depends(tensor) for tensor in tensors(looked_at)):
            self.memory.refuse(read(f".{name} gives Python the values, or memory that no operation shows"))
        given = list(tensors((args, kwargs)))
        before = [version(tensor) for tensor in given]
        result = func(*args, **kwargs)
        found = self.views.after(given, before, list(tensors(result)), [t for t in given if self.memory.depends(t)])
        if "out" in kwargs and any(self.memory.depends(tensor) for tensor in tensors(kwargs["out"])):
            found = lines.current()
        self.lost = found if self.lost is None else self.lost
        return result
