"""The engine: runs the programs of many inputs at once and fills every micro-batch across them."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rsplugins import arithmetic, checks
from rsplugins.certificate import Gathered
from rsplugins.errors import InputValueError, ParameterError, warn
from rsplugins.execution import Execution
from rsplugins.machine.device import is_out_of_memory
from rsplugins.sampling import tuning
from rsplugins.sampling.bookkeeping import Clock, Segment, Slot
from rsplugins.sampling.independence import Guard, Record
from rsplugins.sampling.noise import EXACT, GaussianNoise, NoiseSource, too_coarse
from rsplugins.sampling.program import Program
from rsplugins.sampling.votes import Reader, Sample, ScoreReader, VoteReader

Work = Iterable[tuple[int, Tensor, Program]]
"""(index, item, program) of each input; items of one run have one shape, which may be anything: images, latents, patches."""

# On an H200, batches of 64 made bfloat16 sampling up to nine times slower where many samples are near a tie.
_CANONICAL_ROWS = {"cpu": 1, "cuda": 256}
_CANONICAL_ROWS_OF_HALVES = {"cpu": 32, "cuda": 256}
"""In 16 bits, where up to a third of the samples are near a tie."""


_GUARDED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Record]] = WeakKeyDictionary()
"""What was checked of a function before, for each kind of input: another call looks whether it still holds, and goes on."""
TallyName = Literal["votes", "scores", "values"]


class _Flight(NamedTuple):
    """A micro-batch that was launched and whose result is not booked yet."""

    segments: list[Segment]
    reduced: Tensor
    event: torch.cuda.Event | None


class Sampler:
    """Counts the decisions of a function under noise.

    Vote counts are a function of the weights, the noise stream, the input's index and the sample's index: not of the batch size,
    the order or number of inputs, or what else is in the batch. Score sums agree to float rounding (about 1e-6 a sample).

    Args:
        function: from (B, *shape) to logits (B, K), the rows independent of one another and of earlier calls, which is checked
            (:mod:`rsplugins.sampling.independence`); run in inference mode.
        noise: where the noise comes from.
        num_classes: K; None learns it from the first item.
        execution: batch size, dtype, compilation, layout.
        tally: ``"votes"``; ``"scores"``, softmax probabilities; or ``"values"``, what the function returns taken as scores.
        device: where the function lives; None takes that of its first parameter, or the CPU.
        dtype: of the noisy items, float32 or float64; bfloat16 in ``execution`` is autocast on top of it.

    Raises:
        ParameterError: ``dtype`` is coarser than float32, which would round items before their noise.

    Example:
        >>> from rsplugins.sampling import Draw, GaussianNoise
        >>> def program():
        ...     tally = yield Draw(0, 1000)
        ...     return tally.votes()
        >>> sign = lambda x: torch.stack([x.sum(1), -x.sum(1)], dim=1)
        >>> sampler = Sampler(sign, GaussianNoise(0.5, seed=0), 2, Execution(batch_size=64))
        >>> [sum(done.evidence.values()) for done in sampler.run([(0, torch.full((4,), 0.5), program())])]
        [1000]
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        noise: NoiseSource,
        num_classes: int | None,
        execution: Execution,
        *,
        tally: TallyName = "votes",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.noise, self.num_classes, self.execution, self.tally, self.dtype = noise, num_classes, execution, tally, dtype
        self.device = torch.device(device) if device is not None else _device_of(function)
        if tally not in get_args(TallyName):
            raise ParameterError(f"tally is {tally!r}; expected one of {', '.join(get_args(TallyName))}.")
        if execution.batch_size != "auto" and execution.batch_size < 1:
            raise ParameterError(f"batch_size is {execution.batch_size!r}; expected 'auto' or a number of at least 1.")
        if dtype not in EXACT:
            raise too_coarse(dtype)
        wants = execution.channels_last
        self._weights = _weights_of(function) or dtype
        self.channels_last = tuning.prefers_channels_last(function) if wants is None else wants
        self.batch_size = 0 if execution.batch_size == "auto" else int(execution.batch_size)
        # dynamic=False: the micro-batch and the canonical batch each keep the one graph they are compiled to.
        self._plain = function
        self._guard: Guard | None = None
        self._function = torch.compile(function, dynamic=False) if execution.compile else function
        halves = torch.finfo(self._weights).bits == 16 or execution.dtype == "bfloat16"
        self._capacity = (_CANONICAL_ROWS_OF_HALVES if halves else _CANONICAL_ROWS).get(self.device.type, 64)
        self._ahead = 1 if self.device.type == "cuda" else 0
        self._buffer = torch.empty(0)
        self._reader: Reader  # made with the first item

    @property
    def reevaluated(self) -> int:
        """Samples that were too close to a tie to trust a micro-batch, and were decided in the canonical way."""
        reader = getattr(self, "_reader", None)
        return reader.reevaluated if isinstance(reader, VoteReader) else 0

    def describe(self) -> dict[str, Any]:
        """Return what changes the function that is certified, for a certificate's ``function``, as JSON values."""
        return {
            "dtype": self.execution.dtype if self.execution.dtype != "float32" else str(self.dtype).removeprefix("torch."),
            "arithmetic": arithmetic.spoken(self.device, self._weights, autocast=self.execution.dtype == "bfloat16"),
            "compile": self.execution.compile,
            "device": self.device.type,
            "noise": self.noise.name,
            "near_ties": f"decided in batches of {self._capacity}" if self.tally == "votes" else "not treated",
        }

    def run(self, work: Work) -> Iterator[Gathered]:
        """Run programs and yield what they gathered, in the order of ``work``.

        ``work`` is pulled lazily: one more input whenever those at work no longer fill a micro-batch.

        Raises:
            OutputValueError: logits that are not finite (naming the input), or not of shape (B, K).
            InputValueError: an item of another shape than the first.
            UsageError: what the function returns for an item depends on the rest of its batch, or on earlier calls.
        """
        source, queue, flights = iter(work), deque[Slot](), deque[_Flight]()
        first = next(source, None)
        if first is None:
            return
        self._prepare(first[0], first[1])
        source = itertools.chain([first], source)
        clock, exhausted = Clock(), False
        while True:
            exhausted = exhausted or self._admit(source, queue)
            start = time.perf_counter()
            flight = self._launch(queue)
            if flight is not None:
                flights.append(flight)
            settled = flights.popleft() if flights and (flight is None or len(flights) > self._ahead) else None
            if settled is not None:
                self._settle(settled)
            clock.spent += time.perf_counter() - start
            if settled is not None:
                clock.charge(settled.segments)
            while queue and queue[0].evidence is not None:
                self._check_again(clock)
                yield queue.popleft().gathered()
            if exhausted and not queue:
                return

    def _admit(self, source: Iterator[tuple[int, Tensor, Program]], queue: deque[Slot]) -> bool:
        """Pull inputs until the open samples fill a micro-batch; return whether there are no more inputs."""
        open_samples = sum(slot.unlaunched for slot in queue)
        while open_samples < self.batch_size:
            pulled = next(source, None)
            if pulled is None:
                return True
            index, item, program = pulled
            expected = self._buffer.shape[1:]
            if item.shape != expected:
                raise InputValueError(
                    f"Input {index} has shape {tuple(item.shape)}; the inputs before it have {tuple(expected)}.",
                    fix="Bring all inputs of one call to one shape, or certify each shape by itself.",
                )
            image = self._batch(1, item.shape)[0].copy_(item)
            slot = Slot(index, image, program, self._reader.num_classes, scores=self.tally != "votes")
            slot.proceed()
            queue.append(slot)
            open_samples += slot.unlaunched
        return False

    def _launch(self, queue: Iterable[Slot]) -> _Flight | None:
        """Fill the buffer from the oldest inputs on and run the function; None when nobody waits for samples."""
        segments = self._plan(queue)
        if not segments:
            return None
        try:
            self._check(self._rows(sum(segment.rows for segment in segments)))
            logits = self._evaluate(segments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.batch_size == 1:
                raise
            for segment in segments:
                segment.slot.next = segment.start
            self._shrink()
            return self._launch(queue)
        lengths = torch.tensor([segment.rows for segment in segments])
        owners = torch.repeat_interleave(lengths).to(self.device, non_blocking=True)
        with torch.no_grad():
            reduced = self._reader.reduce(logits, owners, segments)
        if self.device.type != "cuda":
            return _Flight(segments, reduced.cpu(), None)
        pinned = torch.empty(reduced.shape, dtype=reduced.dtype, pin_memory=True).copy_(reduced, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Flight(segments, pinned, event)

    def _plan(self, queue: Iterable[Slot]) -> list[Segment]:
        segments: list[Segment] = []
        room = self.batch_size
        for slot in queue:
            rows = min(slot.unlaunched, room)
            if rows:
                segments.append(Segment(slot, slot.next, rows))
                slot.next += rows
                room -= rows
            if not room:
                break
        return segments

    def _evaluate(self, segments: Sequence[Segment]) -> Tensor:
        row = 0
        for slot, start, rows in segments:
            self.noise.perturb(slot.image, self._buffer[row : row + rows], slot.index, start)
            row += rows
        # What is left of the buffer rides along and is ignored: a compiled function keeps one shape, and to check another one
        # costs more rows than that.
        return self._forward(self._buffer[: self._rows(row)])[:row]

    def _rows(self, needed: int) -> int:
        """Return how many rows are run for so many samples."""
        assert self._guard is not None  # made with the first item
        return needed if self._guard.knows(needed) and not self.execution.compile else self.batch_size

    def _forward(self, batch: Tensor) -> Tensor:
        # What is recorded is what runs: an autocast that the caller is in is left.
        lower = self.execution.dtype == "bfloat16"
        autocast = torch.autocast(self.device.type, torch.bfloat16) if lower else arithmetic.without_autocast()
        with torch.inference_mode(), autocast:
            logits = self._function(batch)
        if not isinstance(logits, Tensor) or logits.shape != (len(batch), self.num_classes):
            checks.check_logits(logits, num_classes=self.num_classes, batch=len(batch))
        return logits

    def _canonical(self, samples: Sequence[Sample]) -> Tensor:
        """Return logits (rows, K) of samples, run in batches of one fixed size."""
        results = []
        scratch = self._batch(self._capacity, samples[0][0].image.shape)
        for first in range(0, len(samples), self._capacity):
            part = samples[first : first + self._capacity]
            for row, (slot, sample) in enumerate(part):
                self.noise.perturb(slot.image, scratch[row : row + 1], slot.index, sample)
            results.append(self._forward(scratch)[: len(part)].clone())
        return torch.cat(results)

    def _settle(self, flight: _Flight) -> None:
        if flight.event is not None:
            flight.event.synchronize()
        self._reader.settle(flight.reduced.numpy(), flight.segments)
        for segment in flight.segments:
            segment.slot.proceed()

    def check(self, index: int, item: Tensor) -> None:
        """Check the function before sampling, with noisy copies of an item, for batches of up to the engine's size.

        Raises:
            UsageError: as :meth:`run`.
        """
        self._prepare(index, item)
        self._check(self.batch_size)

    def _check(self, rows: int) -> None:
        assert self._guard is not None  # made with the first item
        self._guard.check(rows)
        self._keep_record(self._guard.record)

    def _check_again(self, clock: Clock) -> None:
        """Check after an input that the function has not changed; what that costs is the input's."""
        start = time.perf_counter()
        if self._guard is not None:
            self._guard.repeat()
        clock.spent += time.perf_counter() - start

    def _guarded(self, index: int, item: Tensor) -> Guard:
        image = self._batch(1, item.shape)[0].copy_(item)

        def noisy(rows: int) -> Tensor:
            batch = self._batch(rows, item.shape)
            self.noise.perturb(image, batch, index, 0)
            return batch

        coarsest = torch.bfloat16 if self.execution.dtype == "bfloat16" else None
        compiled = self.execution.compile
        kind = self._kind(item.shape)
        known = _GUARDED.setdefault(self._plain, {}) if isinstance(self._plain, nn.Module) else {}
        self._keep_record = functools.partial(known.__setitem__, kind)
        return Guard(
            self._plain,
            self._forward,
            noisy,
            self.device,
            alone=self._capacity,
            coarsest=coarsest,
            compiled=compiled,
            record=known.get(kind),
        )

    def _prepare(self, index: int, item: Tensor) -> None:
        """Make the buffer for items like this one, and learn what was left open: the number of classes, the batch size."""
        # Before any other pass, so that nothing is kept of one that nobody watched. Sampled once more, the function may be
        # another by then, such as after further training.
        if self._buffer.shape[1:] != item.shape or self._guard is None or not self._guard.unchanged():
            self._guard = self._guarded(index, item)
        if self.num_classes is None:
            self.num_classes = int(self._forward(self._batch(1, item.shape)).shape[1])
        if not hasattr(self, "_reader"):
            if self.tally == "votes":
                self._reader = VoteReader(self.num_classes, self._canonical, self._capacity)
            else:
                self._reader = ScoreReader(self.num_classes, softmax=self.tally == "scores")
        if not self.batch_size:
            probe, known = item.to(self.device, self.dtype), tuning.signature(self._plain)
            key = (known, *self._kind(item.shape)) if known else ()
            self.batch_size = tuning.best_batch_size(
                self._forward, lambda rows: self._batch(rows, item.shape).add_(probe), key=key
            )
        if self._buffer.shape != (self.batch_size, *item.shape):
            self._buffer = self._batch(self.batch_size, item.shape)

    def _kind(self, shape: Sequence[int]) -> tuple[Any, ...]:
        """Return what, besides the function, decides which kernels run."""
        chosen = self.execution
        return tuple(shape), str(self.dtype), self.channels_last, str(self.device), chosen.dtype, chosen.compile

    def _shrink(self) -> None:
        shape, self._buffer = self._buffer.shape[1:], torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before, self.batch_size = self.batch_size, self.batch_size // 2
        warn(
            f"Out of memory with batches of {before}; going on with {self.batch_size}. The results are the same. "
            f"Set batch_size={self.batch_size} to begin there."
        )
        self._buffer = self._batch(self.batch_size, shape)

    def _batch(self, rows: int, shape: Sequence[int]) -> Tensor:
        return tuning.empty_batch(rows, shape, channels_last=self.channels_last, dtype=self.dtype, device=self.device)


def check_independent(classifier: nn.Module, index: int, item: Tensor, execution: Execution, *, sigma: float, rows: int) -> None:
    """Check a model of which a sampler runs another function: a part, or one that calls it for many windows of an image.

    Args:
        classifier: from (B, *shape) to logits.
        index: of the input.
        item: what it is given, without a batch dimension.
        execution: how the sampler runs.
        sigma: of the noise that is added to the item.
        rows: the largest batch that is tried.

    Raises:
        UsageError: what it returns for an item depends on the rest of its batch, or on earlier calls.
    """
    plain = replace(execution, batch_size=rows, compile=False)
    noise, dtype = GaussianNoise(sigma, execution.seed), torch.promote_types(item.dtype, torch.float32)
    Sampler(classifier, noise, None, plain, device=item.device, dtype=dtype).check(index, item)


def _weights_of(function: Callable[[Tensor], Tensor]) -> torch.dtype | None:
    tensors = (*function.parameters(), *function.buffers()) if isinstance(function, nn.Module) else ()
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def _device_of(function: Callable[[Tensor], Tensor]) -> torch.device:
    first = next(function.parameters(), None) if isinstance(function, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")
