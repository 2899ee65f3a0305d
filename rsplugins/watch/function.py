"""The check that a model is one function of pixels whatever their values, by a few passes that are watched."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsplugins.checks import named_layer
from rsplugins.double import bring
from rsplugins.errors import UsageError
from rsplugins.watch import lines
from rsplugins.watch.source import Code
from rsplugins.watch.state import changed, reachable, snapshot
from rsplugins.watch.taint import INSTEAD, Memory, Operations, Readings, read, restless, tensors
from rsplugins.watch.writes import lost

_QUESTIONS = ("is_tracing", "is_grad_enabled", "is_inference_mode_enabled", "_get_tracing_state", "Proxy", "_getframe")
"""Names by which a forward can tell how it is run."""
_WORLD = (
    "environ", "getenv", "putenv", "urandom", "getpid", "time.time", "time_ns", "monotonic", "monotonic_ns", "perf_counter",
    "perf_counter_ns", "process_time", "datetime.now", "datetime.today", "utcnow", "secrets", "SystemRandom", "uuid4",
)  # fmt: skip
"""Names by which a forward can see or change what no check of its state sees: the clock, the environment, the system's chance."""


def check_function(module: nn.Module, example: Tensor, *, exact: bool = True, views: bool = False) -> None:
    """Check that a model's forward never looks at values that depend on pixels, draws no random numbers and keeps no state.

    A trace records one sequence of operations. It stands for the model only if Python cannot choose another one by the values of
    the pixels, by chance or by what earlier calls left behind. Shapes may be looked at, and values of weights and constants.

    Three passes over random images are watched: two of two images without gradients, which must run the same operations with the
    same constants, and one of a single image with gradients. No image can hide a branch, since it is its question that is refused
    and not its answer.

    Args:
        module: in the mode and dtype that it is deployed in. Random generators are put back; attributes that it changes are not.
        example: (B, ...), for shape, dtype and device.
        exact: whether constants have to agree and weights to stay; not for layers whose weights change a little at each reading.
        views: whether a write in place that is read through another view of the same memory is refused too.

    Raises:
        UsageError: naming the line of the model's code where there is one.
    """
    code = Code(reachable(module))
    asked = code.line_with(_QUESTIONS)
    if asked is not None:
        raise _asks(asked)
    _check_world(code)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand((5, *example.shape[1:]), generator=generator, dtype=torch.float64)
    drawn = bring(drawn, example.device, example.dtype)
    first, second, single = drawn[:2], drawn[2:4], drawn[4:]
    memory = Memory(_lasting(module))
    with kept_generators(example.device), _plain_code():
        watched = []
        with torch.no_grad():
            for images in (first, second):
                seen = _watched(module, images, memory, exact, exact, views)
                if seen is None:
                    return  # it runs on no pair of images, which every door says in its own words
                watched.append((seen, snapshot(module, memory.depends)))
        with torch.enable_grad():
            _watched(module, single, memory, False, exact, views)
        (one, before), (other, after) = watched
        if exact:
            with torch.no_grad():
                _check_same(one, other, lambda: _watched(module, first, memory, True, True, views))
            _check_state(module, before, after)


def check_each_alone(module: nn.Module, images: Tensor) -> set[tuple[str, str]]:
    """Check that a model's forward asks Python nothing about values of its batch: the answer would be about all images together.

    Two passes are watched, so that what the first leaves of its images and the second reads is found too. No image can hide a
    branch, since it is its question that is refused and not its answer. A model that cannot be watched is let through.

    Args:
        module: in the mode and dtype that it is sampled in.
        images: (B, ...), two or more.

    Returns:
        The layers, by name, and attributes that hold a tensor which depends on the last batch: features that a model leaves for
        others to look at, or carries to the end of its own forward. Reading one in a later pass would have been refused.

    Raises:
        UsageError: naming the line of the model's code where there is one.
    """
    _check_world(Code(reachable(module)))
    memory = Memory(_lasting(module))
    try:
        with kept_generators(images.device), _plain_code(), torch.no_grad():
            watched = [_watched(module, batch, memory, False, False, False) for batch in (images, images.flip(0))]
    except UsageError:
        if memory.finding is None:
            return set()
        raise _of_a_batch(memory.finding) from None
    if None in watched:
        return set()
    attributes = ((name, key, value) for name, layer in module.named_modules() for key, value in vars(layer).items())
    return {(name, key) for name, key, value in attributes if isinstance(value, Tensor) and memory.depends(value)}


def _check_world(code: Code) -> None:
    line = code.line_with(_WORLD)
    if line is not None:
        raise restless(
            "it uses the clock, the environment or the system's random numbers",
            line,
            "what a forward reads or keeps outside the model can be another thing at its next call.",
        )


def _of_a_batch(found: UsageError) -> UsageError:
    """Return a refusal in words for a certifier that runs the model itself, on batches."""
    if not found.fix.endswith(INSTEAD):  # a state or chance, which is as wrong there
        return found
    return UsageError(
        found.what,
        cause="a branch, an index, a count or a constant is made from the values of a whole batch, so that images decide for "
        "each other.",
        fix="Write it with tensor operations that treat each image by itself (torch.where, a product with a mask).",
    )


def _asks(line: str) -> UsageError:
    return UsageError(
        f"The model's forward asks how it is run{lines.place(line)}. Nothing was certified.",
        cause="it can be one function while it is traced and another one when it is used.",
        fix="Leave the question out, or use a certifier that runs the model itself, such as 'gaussian'.",
    )


def _lasting(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in module.named_modules():
        said = named_layer(name, layer)
        own = {"parameter": layer._parameters, "buffer": layer._buffers, "attribute": vars(layer)}
        for kind, values in own.items():
            for key, value in values.items():
                yield from ((f"{kind} {key!r} of {said}", tensor) for tensor in tensors(value))


def _watched(module: nn.Module, images: Tensor, memory: Memory, exact: bool, fixed: bool, views: bool) -> Operations | None:
    """Run one pass; None when the model does not run on such images, watched or not."""
    memory.round += 1
    operations, readings = Operations(memory, exact=exact, fixed=fixed), Readings(memory)
    given = images.clone()
    memory.made(given, marked=True)
    before = _drawn()
    try:
        with readings, operations:
            output = module(given)
    except Exception as error:
        if memory.finding is not None:
            raise memory.finding from None
        if isinstance(error, UsageError) or not _runs(module, images):
            return None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"The model cannot be watched while it runs: {reason}",
            cause="a part of it does not run under torch's dispatch modes, by which it is seen whether Python looks at pixels.",
            fix="Use a certifier that runs the model itself, such as 'gaussian'.",
        ) from error
    if memory.finding is not None:  # the model swallowed it
        raise memory.finding
    if operations.failed:
        raise read(f"an operation failed and the model went on, which may depend on values ({operations.failed})")
    stale = readings.views.line_of([t for t in tensors(output) if memory.depends(t)]) if readings.lost is None else readings.lost
    if views and stale is not None:
        raise lost(stale)
    drawn = [said for said, state in _drawn().items() if before[said] != state]
    if drawn:
        raise restless(f"it draws from {drawn[0]}", "", "random, numpy.random or torch's generator is used in eval mode.")
    if exact:
        operations.exact = False
        operations.seen.append(("output", *("pixels" if memory.depends(t) else repr(t) for t in tensors(output))))
    return operations


def _runs(module: nn.Module, images: Tensor) -> bool:
    try:
        module(images.clone())
    except Exception:
        return False
    return True


def _check_same(one: Operations, other: Operations, again: Callable[[], Operations | None]) -> None:
    line = _difference(one, other)
    if line is None:
        return
    repeated = again()
    if repeated is None or _difference(one, repeated) is not None:
        raise restless("two passes differ in operations or constants", line, "forward counts, caches or draws something.")
    raise UsageError(
        f"The model's forward runs other operations or constants for other images{lines.place(line)}. Nothing was certified.",
        cause="values of pixels leave torch's tensors (numpy, a thread, memory read by itself) and come back as a constant.",
        fix="Write it with tensor operations, or use a certifier that runs the model itself, such as 'gaussian'.",
    )


def _difference(one: Operations, other: Operations) -> str | None:
    """Return the line at which two passes differ, None where they do not."""
    for place, (a, b) in enumerate(itertools.zip_longest(one.seen, other.seen)):
        if a != b:
            places = one.places if place < len(one.places) else other.places
            return places[place] if place < len(places) else ""
    return None


def _check_state(module: nn.Module, before: dict[str, Any], after: dict[str, Any]) -> None:
    found = changed(module, before, after)
    if found is not None:
        name, line = found
        raise restless(f"each call changes {name}", line, "forward counts, collects or caches something between calls.")


def _drawn() -> dict[str, Any]:
    numbers = np.random.get_state()
    return {
        "the random generator of Python": random.getstate(),
        "the random generator of numpy": (numbers[1].tobytes(), numbers[2:]),  # type: ignore[index]
        "the random generator of torch": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put the global random generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _plain_code() -> Iterator[None]:
    """Run what torch.compile wraps as it was written: compiled code runs under no mode."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # nobody compiles without it, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
