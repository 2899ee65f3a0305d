"""Whether a function gives each image what it would give it alone, and the same at every call: what every sampler rests on.

Before the first micro-batch of each size (and of two small ones), noisy images of the first input, and points between two of
them where the class is about to change, are run alone; in batches of that size beside other noisy images, beside images of
other contents and beside extreme ones; in another order; and again. Between two batches of the same shape the kernels are the
same, so what other rows do to an image shows down to a few units in the last place; between batches of different sizes kernels
round differently, and only a difference above that is a fault. What the function remembers is looked at besides
(:mod:`rsplugins.sampling.state`), and after each input a small batch is run again.

What cannot be seen: a function that does otherwise only for contents that none of these images has, or that keeps what it
remembers where Python cannot look and uses it later than the last look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsplugins.checks import named_layer
from rsplugins.double import double
from rsplugins.errors import UsageError
from rsplugins.machine.device import is_out_of_memory
from rsplugins.machine.progress import step
from rsplugins.sampling.state import Seen, Watch, changed, generators
from rsplugins.watch import check_each_alone

SMALL = (2, 7)
"""Sizes of batch that are tried whatever the engine's is; the larger one is run again after each input."""
_NOISY, _STEPS, _KEPT_STEPS = 4, 12, 4
_REPEAT = {"cpu": 16.0, "cuda": 64.0}
"""How many units in the last place two runs of the same kernels may differ by."""
_ACROSS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""How far kernels for batches of different size may be apart, relative to the largest logit; float32 includes TF32."""

Forward = Callable[[Tensor], Tensor]


class Tolerance(NamedTuple):
    """How far logits may differ, relative to the largest one.

    Attributes:
        repeat: when the same kernels run.
        across: when others do, for a batch of another size or a row at another place.
    """

    repeat: float
    across: float

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device, *, compiled: bool = False) -> Tolerance:
        """Return the tolerance for the coarsest format that a function computes in."""
        eps = torch.finfo(dtype).eps
        repeat = _REPEAT.get(device.type, 64.0) * eps if dtype in (torch.float32, torch.float64) else 2 * eps
        return cls(repeat, _ACROSS.get(dtype, 1e-1) * (4 if compiled else 1))


class _Trial(NamedTuple):
    """What one group of images got in batches of one size, as logits of these images alone.

    Attributes:
        names: of the images among all that are tried.
        first: beside other noisy images.
        again: the same batch once more, after all the others.
        others: beside other contents, one entry each.
        moved: the first batch in another order.
        batches: the batches of ``first`` and of each of ``others``, and where the images are in it.
    """

    names: slice
    first: Tensor
    again: Tensor
    others: list[Tensor]
    moved: Tensor
    batches: list[Tensor]
    places: Tensor


@dataclass
class Record:
    """What was checked of a function, and what shows whether it is the same still.

    Attributes:
        state: what the function could remember, after the last check.
        passing: what its passes leave behind and none of them reads.
        sizes: of batch that were checked, each with images that were tried, their places in the batch, and their logits.
        targets: (T, *shape), the images that are tried.
        logits: (T, K), what each gets alone.
        again: a small batch.
        expected: what it gets.
        tolerance: how far logits may differ.
        scale: the largest logit.
    """

    state: Seen
    passing: set[tuple[str, str]]
    sizes: dict[int, tuple[slice, Tensor, Tensor]] = field(default_factory=dict)
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    again: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: Tensor = field(default_factory=lambda: torch.empty(0))
    tolerance: Tolerance = field(default_factory=lambda: Tolerance(0.0, 0.0))
    scale: float = 0.0


class Guard:
    """Checks one function for images of one shape.

    Args:
        function: what is watched and named: the module, before it is compiled.
        forward: runs a batch as the engine does.
        noisy: from a number of rows to so many noisy copies of the first input, in the layout of the engine.
        device: where the function runs.
        alone: the size of batch in which the engine decides near-ties.
        coarsest: the dtype of lower precision that the engine computes in, when it does.
        compiled: whether the function is; it is compiled anew for each size, so no other than the engine's are tried.
        record: of an earlier guard of the same function for such images: it goes on where that one was, if the function is the
            same in all that can be seen.

    Raises:
        UsageError: the function asks Python about values of its batch, or uses what it kept of an earlier one.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        forward: Forward,
        noisy: Callable[[int], Tensor],
        device: torch.device,
        *,
        alone: int = 1,
        coarsest: torch.dtype | None = None,
        compiled: bool = False,
        record: Record | None = None,
    ) -> None:
        self._function, self._run, self._noisy, self._device = function, forward, noisy, device
        self._alone, self._compiled, self._coarsest = alone, compiled, coarsest
        self._watch = Watch(function)
        self._tried: set[int] = set()
        """Sizes that this guard has run, and not only read of."""
        if record is None or not self._takes(record):
            self._begin()

    def _begin(self) -> None:
        self._tried.clear()
        if isinstance(self._function, nn.Module):
            self._watch.passing = check_each_alone(self._function, self._noisy(SMALL[0]))
        self.record = Record(self._watch.look(), self._watch.passing)

    def _takes(self, record: Record) -> bool:
        """Take over what was checked before, and return whether the function is as it was then."""
        self.record, self._watch.passing = record, record.passing
        # The bytes of every tensor are read: a change through .data moves no version counter.
        return bool(record.sizes) and not changed(record.state, self._watch.look()) and self._repeats()

    def knows(self, size: int) -> bool:
        """Return whether batches of one size were checked."""
        return size in self.record.sizes

    def check(self, size: int) -> None:
        """Check batches of one size, and at the first call what holds at any; nothing for a size that was checked.

        Raises:
            UsageError: the images of a batch depend on each other, or the function on what it was given before.
        """
        if size not in self._tried:
            with step(f"checking that each image of a batch of {size} is treated alone"):
                self._check_once(size)

    def _check_once(self, size: int) -> None:
        if size in self.record.sizes:
            if self._gives_the_same(size):
                self._tried.add(size)
                return
            self._begin()  # it is another function: a layer of torch, a mode, or something else that no look sees, has changed
        if not self.record.sizes:
            self._prepare()
            for small in sorted({*SMALL, self._alone} - {1, size}) if not self._compiled else ():
                self._try_small(small)
        trial = self._check(size)
        self.record.sizes[size] = trial.names, trial.places, trial.first
        self._tried.add(size)

    def _gives_the_same(self, size: int) -> bool:
        """Whether a batch of a size that was checked gives images what it gave them, beside extreme contents."""
        names, places, first = self.record.sizes[size]
        *_, extreme = _other_contents(self._noisy(size))
        found = self._rows(_placed(extreme, self.record.targets[names], places), places)
        return self._same(found, first, self.record.tolerance.repeat)

    def repeat(self) -> None:
        """Check that the function still does what it did when it was checked.

        Raises:
            UsageError: it does not.
        """
        self._compare_state(self.record.state, self._watch.look(fresh=False), "since sampling began")
        if not self._repeats():
            raise _remembers("its logits for the same batch have changed since sampling began")

    def _repeats(self) -> bool:
        known = self.record
        return not len(known.again) or self._same(self._run(known.again.clone()), known.expected, known.tolerance.repeat)

    def unchanged(self) -> bool:
        """Whether :meth:`repeat` finds nothing, for a function that is to be sampled once more."""
        try:
            self.repeat()
        except UsageError:
            return False
        return True

    def _prepare(self) -> None:
        """Find the images, and what each gets alone."""
        before = self.record.state
        rows = self._noisy(_NOISY)
        logits = self._one_by_one(rows)
        self.record.state = self._watch.look()
        lasting = [said for said in changed(before, self.record.state) if said in self._watch.lasting]
        if lasting:
            raise _changes(lasting)
        near = self._near_ties(rows, logits)
        targets = torch.cat([rows, near])
        found = torch.cat([logits, self._one_by_one(near)]) if len(near) else logits
        # By turns, so that a small group has both.
        order = torch.arange(len(targets)).reshape(-1, _NOISY).T.flatten()
        self.record.targets, found = targets[order.to(rows.device)], found[order.to(found.device)]
        finite = found[found.isfinite()]
        self.record.scale = float(finite.abs().max()) if len(finite) else 0.0
        dtypes = [found.dtype, *([self._coarsest] if self._coarsest else []), *_dtypes(self._function)]
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.record.tolerance = Tolerance.of(coarsest, self._device, compiled=self._compiled)
        self.record.logits = double(found)

    def _try_small(self, size: int) -> None:
        try:
            self._check(size, groups=1)
        except UsageError:
            raise
        except Exception as error:
            # The engine does not run this size: a network for batches of one size is its own affair.
            if not (is_out_of_memory(error) or isinstance(error, (RuntimeError, ValueError, AssertionError, IndexError))):
                raise

    def _check(self, size: int, groups: int | None = None) -> _Trial:
        self._compare_state(self.record.state, self._watch.look())
        self._run(self._noisy(size))  # what a model computes once for a shape, such as a table of positions, it may keep
        self.record.state, before = self._watch.look(), generators(self._device)
        trials = list(islice(self._trials(size), groups))
        alone = double(self._one_by_one(self.record.targets)) if groups is None else self.record.logits
        self._compare_state(self.record.state, self._watch.look())
        drawn = changed(before, generators(self._device))
        if drawn:
            raise _random(drawn)
        if not self._same(alone, self.record.logits, self.record.tolerance.repeat):
            raise _remembers("its logits for one image alone differ between two calls with other images in between")
        for trial in trials:
            self._judge(trial, size)
        if not len(self.record.again) or size == SMALL[-1]:
            self.record.again = trials[0].batches[0]
            self.record.expected = double(self._run(self.record.again.clone()))
        return trials[0]

    def _trials(self, size: int) -> Iterator[_Trial]:
        share = max(1, size // 2)
        random = torch.Generator().manual_seed(size)
        for start in range(0, len(self.record.targets), share):
            names = slice(start, start + share)
            images = self.record.targets[names]
            places = torch.randperm(size, generator=random)[: len(images)]
            noisy = self._noisy(size + _NOISY)[_NOISY:]  # not the images themselves
            batches = [_placed(filled, images, places) for filled in (noisy, *_other_contents(noisy))]
            first, *others = (self._rows(batch, places) for batch in batches)
            order = torch.arange(size - 1, -1, -1)
            moved = self._rows(batches[0][order.to(batches[0].device)], size - 1 - places)
            yield _Trial(names, first, self._rows(batches[0], places), others, moved, batches, places)

    def _judge(self, trial: _Trial, size: int) -> None:
        if not self._same(trial.again, trial.first, self.record.tolerance.repeat):
            raise _remembers(f"its logits for the same batch of {size} differ between two calls with others in between")
        for other, batch in zip(trial.others, trial.batches[1:], strict=True):
            if not self._same(other, trial.first, self.record.tolerance.repeat):
                layer = self._first_layer(trial.batches[0], batch, trial.places) if not self._compiled else ""
                raise _mixes(size, self._gap(other, trial.first), layer)
        for found, what in ((trial.first, f"in a batch of {size}"), (trial.moved, f"at another place in a batch of {size}")):
            if not self._same(found, self.record.logits[trial.names], self.record.tolerance.across):
                raise _depends_on_size(what, self._gap(found, self.record.logits[trial.names]), self.record.tolerance.across)

    def _near_ties(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return images on the way to the nearest other class, each with half the lead of the one before."""
        others = torch.cat([rows[1:], *_other_contents(rows)])
        found = self._one_by_one(others)
        classes = found.argmax(1)
        apart = (classes != logits[0].argmax()) & found.isfinite().all(1)
        if logits.shape[1] < 2 or not bool(logits[0].isfinite().all()) or not bool(apart.any()):
            return rows[:0]
        here, there, seen = rows[:1], others[int(apart.nonzero()[0])][None], []
        for _ in range(_STEPS):
            middle = (here + there) / 2
            if int(self._one_by_one(middle)[0].argmax()) == int(logits[0].argmax()):
                here = middle
            else:
                there = middle
            seen.append(middle)
        return torch.cat(seen[2 :: _STEPS // _KEPT_STEPS])

    def _one_by_one(self, images: Tensor) -> Tensor:
        """Return the logits of images in batches of the size in which the engine decides near-ties."""
        found = []
        for start in range(0, len(images), self._alone):
            part = images[start : start + self._alone]
            batch = self._noisy(self._alone) if len(part) < self._alone else part.clone()
            batch[: len(part)] = part
            found.append(self._run(batch)[: len(part)].clone())
        return torch.cat(found) if found else self._run(images.clone())

    def _rows(self, batch: Tensor, places: Tensor) -> Tensor:
        # On a copy: a model may write on what it is given.
        logits = self._run(batch.clone())
        return double(logits[places.to(logits.device)])

    def _same(self, found: Tensor, expected: Tensor, tolerance: float) -> bool:
        return torch.allclose(double(found), double(expected), rtol=0.0, atol=tolerance * self.record.scale, equal_nan=True)

    def _gap(self, found: Tensor, expected: Tensor) -> float:
        gap = float((found - expected).abs().nan_to_num(torch.inf).max())
        return gap / self.record.scale if self.record.scale else math.inf

    def _compare_state(self, before: Seen, after: Seen, when: str = "by a forward pass") -> None:
        words = changed(before, after)
        if words:
            raise _changes(words, when)

    def _first_layer(self, first: Tensor, second: Tensor, places: Tensor) -> str:
        """Return the first layer whose output for the same images differs between two batches; nothing when none is seen."""
        if not isinstance(self._function, nn.Module):
            return ""
        seen, again = (_outputs(self._function, self._run, batch, places) for batch in (first, second))
        for (name, here), (_, there) in zip(seen, again, strict=False):
            scale = float(here.abs().nan_to_num(0.0, 0.0, 0.0).max()) if here.numel() else 0.0
            if here.shape == there.shape and not torch.allclose(
                here, there, rtol=0.0, atol=self.record.tolerance.repeat * scale, equal_nan=True
            ):
                return name
        return ""


def _placed(others: Tensor, images: Tensor, places: Tensor) -> Tensor:
    batch = others.clone()
    batch[places.to(batch.device)] = images
    return batch


def _other_contents(noisy: Tensor) -> Iterator[Tensor]:
    """Yield rows of other contents in the place of noisy rows: such as other images have, and extreme ones."""
    flat = noisy.flatten(1)
    low, high = flat.amin(), flat.amax()
    turned = noisy.flip(tuple(range(1, noisy.dim())))
    kinds = [low + high - noisy, 0.5 * noisy + 0.5 * high, turned, 0.5 * noisy + 0.5 * low]
    yield _alternately(kinds)
    step = (high - low).clamp_min(1e-3)
    yield _alternately([20 * (noisy - flat.mean()), noisy + 8 * step, -20 * noisy, turned - 8 * step])


def _alternately(kinds: list[Tensor]) -> Tensor:
    rows = kinds[0].clone()
    for place in range(1, len(kinds)):
        rows[place :: len(kinds)] = kinds[place][place :: len(kinds)]
    return rows


def _dtypes(function: Callable[[Tensor], Tensor]) -> set[torch.dtype]:
    tensors = function.parameters() if isinstance(function, nn.Module) else ()
    return {tensor.dtype for tensor in tensors if tensor.dtype in _ACROSS}


def _outputs(module: nn.Module, run: Forward, batch: Tensor, places: Tensor) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def after(layer: nn.Module, _: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() and len(output) == len(batch) and output.is_floating_point():
                said = named_layer(name, layer)
                found.append((said, double(output[places.to(output.device)])))

        return after

    handles = [layer.register_forward_hook(keep(name)) for name, layer in module.named_modules()]
    try:
        run(batch.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _mixes(size: int, gap: float, layer: str) -> UsageError:
    return UsageError(
        f"The model's output for an image depends on the other images of its batch: in a batch of {size} its logits move by "
        f"{gap:.2g} of the largest{f', first at layer {layer}' if layer else ''}. Nothing was certified.",
        cause="something is computed over the batch dimension: x - x.mean(0), statistics of the batch, softmax(dim=0), a sort "
        "or a maximum over the images, dynamic quantisation with one scale for all.",
        fix="Compute over the other dimensions only, with statistics that were fixed in training.",
    )


def _depends_on_size(what: str, gap: float, allowed: float) -> UsageError:
    return UsageError(
        f"The model gives an image another output {what} than alone: its logits differ by {gap:.2g} of the largest, where "
        f"rounding explains {allowed:.0e}. Nothing was certified.",
        cause="forward uses the batch size as a number, or the place of an image in its batch.",
        fix="Make forward treat each image of a batch as it would treat it alone.",
    )


def _changes(words: list[str], when: str = "by a forward pass") -> UsageError:
    more = f", and {len(words) - 1} more" if len(words) > 1 else ""
    return UsageError(
        f"The model has state: {words[0]} was changed {when}{more}. Nothing was certified.",
        cause="forward counts, averages, collects or caches what it is given, also in eval mode; its output may then depend on "
        "the images before, and no certificate holds.",
        fix="Remove what is kept between calls, or register it as a buffer that only training changes.",
    )


def _random(words: list[str]) -> UsageError:
    return UsageError(
        f"The model is random: a forward pass in eval mode draws from {words[0]}. Nothing was certified.",
        cause="dropout with training=True, noise or sampling inside forward.",
        fix="Make forward a function of its input alone; the certifier adds the noise.",
    )


def _remembers(what: str) -> UsageError:
    return UsageError(
        f"The model is random or remembers its calls: {what}. Nothing was certified.",
        cause="forward draws random numbers, or uses what an earlier call left: a running average, a counter, old outputs.",
        fix="Make forward a function of its input alone.",
    )
