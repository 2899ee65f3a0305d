"""Small torch models as Python source, drawn from a seeded grammar; each comes with an honest twin.

A model is text: a ``Model`` whose ``forward`` may hide a trap (:mod:`traps` and others), and ``honest(m, x, seen)``, which
computes for every row of a batch, in one differentiable pass, what ``Model`` returns for that row alone and fresh. Certifiers are
given ``Model``; the oracle searches with ``honest`` and believes only what ``Model`` itself, run on one image, confirms.
"""

from __future__ import annotations

import importlib.util
import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracles import traps, traps_arguments, traps_calls, traps_values, traps_writes  # noqa: F401  # each fills the table

TOPOLOGIES = ((1, 3, 3), (1, 4, 4), (2, 3, 3), (2, 4, 4), (3, 4, 4), (1, 5, 5), (3, 5, 5), (3, 6, 6))

PRELUDE = '''
import itertools
import math
import random
import zlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SEED, ALIGNED, GAIN, OFFSET = {seed}, {aligned}, {gain}, {offset}
{head}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, x):
        h = x
{real}
        return h


def fill(model):
    """Give every parameter numbers of its own; ALIGNED makes layers of nearly rank one, whose Lipschitz bounds are attained."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if "running" not in name and not isinstance(p, nn.Parameter):
            continue
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(SEED * 7919 + zlib.crc32(name.encode())))
        fan = max(1, p[0].numel()) if p.dim() > 1 else 1
        if name.endswith("running_var"):
            value = 0.5 + noise.abs()
        elif p.dim() <= 1:
            value = 0.1 * noise + float(name.endswith("weight"))
        elif ALIGNED:
            value = (1 + 0.1 * noise) / (fan * len(p)) ** 0.5
            if name == "last.weight":
                value = value * torch.tensor([1.0] + [-1.0] * (len(p) - 1))[:, None]
        else:
            value = noise * 1.4 / fan**0.5
        p.data.copy_(value * GAIN if name.startswith("last") else value)


def make():
    model = Model().eval()
    fill(model)
    if OFFSET:
        model.last.bias.data.add_(torch.tensor(OFFSET))
    return model


def rows(v):
    return v.flatten(1)


def col(s, like):
    return s.reshape(-1, *[1] * (like.dim() - 1))


def where(mask, a, b):
    return torch.where(col(mask, b), a, b)


def honest(m, x, seen):
    h = x
{twin}
    return h
'''
_numbers = itertools.count()


def load(source: str, folder: Path) -> ModuleType:
    """Import source text as a module of its own, with globals of its own, from a file that errors can name lines of."""
    number = next(_numbers)
    path = folder / f"fuzzed_{number}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"fuzzed_{number}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """A model with images to certify and what the oracle knows of it.

    Attributes:
        source: text of the module.
        images: (2, C, H, W), raw pixels.
        classes: number of logits.
        mean, std: of the normalisation around the model, or None.
        traps: kinds of the traps inside.
        layers: names of the layers, for a cut.
        distance: l2 distance from the first image to another class, to first order and without the traps.
    """

    seed: int
    source: str
    images: Tensor
    classes: int
    mean: float | None
    std: float | None
    traps: tuple[str, ...]
    layers: tuple[str, ...]
    distance: float

    @property
    def random(self) -> bool:
        """Whether the model draws random numbers."""
        return any(kind.startswith("random") for kind in self.traps)

    @property
    def stateful(self) -> bool:
        """Whether the model remembers calls."""
        return any(kind.startswith("state") for kind in self.traps)

    def normalised(self, x: Tensor) -> Tensor:
        """Return what the model is given for raw pixels."""
        if self.mean is not None:
            x = x - self.mean
        return x if self.std is None else x / self.std


class Builder:
    """Writes one model line by line; knows the value of each expression so far on the images."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng([seed, 0])
        self.aligned = bool(self.rng.random() < 0.6)
        self.gain = 30 if self.rng.random() < 0.6 else 1  # scores near 0 and 1, or not
        shape = TOPOLOGIES[self.rng.integers(len(TOPOLOGIES))]
        # Random images, on which checks are made, are seldom bright or dark all over: what a trap waits for stays unseen there.
        low, high = ((0.88, 0.95), (0.05, 0.12), (0.15, 0.85))[self.rng.choice(3, p=(0.6, 0.1, 0.3))]
        images = torch.tensor(self.rng.uniform(low, high, (1, *shape)), dtype=torch.float64)
        near = images + torch.tensor(self.rng.uniform(-0.01, 0.01, (1, *shape)))
        self.images = torch.cat([images, near]).float()
        self.classes = int(self.rng.integers(2, 5))
        self.mean, self.std = (0.45, 0.25) if self.rng.random() < 0.25 else (None, None)
        self.head: list[str] = []
        self.init: list[str] = []
        self.real: list[str] = []
        self.twin: list[str] = []
        self.layers: list[str] = []
        self.offset: list[float] = []
        self.distance = float(self.rng.uniform(0.15, 0.6))

    def choose(self, options: Any) -> Any:
        """Return one of the options."""
        options = list(options)
        return options[self.rng.integers(len(options))]

    def variant(self, options: Any) -> Any:
        """Return each of the options in turn, as the seeds come round to one kind of trap."""
        options = list(options)
        return options[self.seed * 3 // 4 // len(traps.TABLE) % len(options)]

    def uniform(self, low: float, high: float) -> float:
        """Return a number, short enough to read."""
        return round(float(self.rng.uniform(low, high)), 4)

    def layer(self, text: str, name: str = "") -> str:
        """Add a layer and return how to call it."""
        name = name or f"layer{len(self.layers)}"
        self.init.append(f"self.{name} = {text}")
        self.layers.append(name)
        return f"M.{name}"

    def emit(self, real: str, twin: str | None = None) -> None:
        """Add lines to forward, and to the twin where they are to differ; ``M`` stands for the model."""
        self.real.append(textwrap.dedent(real).strip().replace("M.", "self."))
        self.twin.append(textwrap.dedent(real if twin is None else twin).strip().replace("M.", "m."))

    def source(self, *more: str) -> str:
        """Return the module's text, with more lines at the end of the twin."""
        init, real, twin = ("\n".join(lines) or "pass" for lines in (self.init, self.real, (*self.twin, *more)))
        return PRELUDE.format(
            seed=self.seed,
            aligned=self.aligned,
            gain=self.gain,
            offset=self.offset,
            head="\n".join(self.head),
            init=textwrap.indent(init, " " * 8),
            real=textwrap.indent(real, " " * 8),
            twin=textwrap.indent(twin, " " * 4),
        )

    def value(self, expression: str, images: Tensor | None = None) -> Tensor:
        """Return what an expression of the twin gives here, for raw images; differentiable."""
        space: dict[str, Any] = {}
        exec(self.source(f"return {expression}"), space)
        x = (self.images if images is None else images).double()
        if self.mean is not None:
            x = (x - self.mean) / self.std
        found: Tensor = space["honest"](space["make"]().double(), x, [])
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of h for one image."""
        with torch.no_grad():
            return tuple(self.value("h").shape[1:])

    def slope(self, expression: str) -> tuple[float, float]:
        """Return the largest value of a per-row expression on the images, and how fast it changes there in l2."""
        x = self.images.double().requires_grad_(True)
        found = self.value(expression, x)
        slope = 0.0
        if found.requires_grad:
            (gradient,) = torch.autograd.grad(found.sum(), x)
            slope = float(gradient.flatten(1).norm(dim=1).max())
        return float(found.detach().max()), slope or 1.0

    def threshold(self, expression: str) -> float:
        """Return a number that the per-row expression is below on both images, and reaches not far from them."""
        value, slope = self.slope(expression)
        return round(value + self.uniform(0.01, 0.07) * slope, 6)


def _conv(b: Builder, channels: int, *, same: bool = False) -> str:
    c, height, width = b.shape
    kernel = 3 if same else int(b.rng.integers(1, min(3, height, width) + 1))
    stride = 1 if same or kernel < 2 or min(height, width) < 4 else int(b.rng.integers(1, 3))
    padding = 1 if same else int(b.rng.integers(0, 2)) if kernel > 1 else 0
    bias = bool(b.rng.random() < 0.8)
    return b.layer(f"nn.Conv2d({c}, {channels}, {kernel}, stride={stride}, padding={padding}, bias={bias})")


def _image_step(b: Builder) -> None:
    c, height, width = b.shape
    small = min(height, width) < 2
    kind = b.choose(["conv"] * 4 + ["relu", "act", "pool", "norm", "residual", "cat", "pad", "crop"])
    if kind == "conv" or (small and kind in ("pool", "crop")):
        b.emit(f"h = {_conv(b, int(b.rng.integers(2, 4)))}(h)")
        b.emit(f"h = {b.choose(['F.relu(h)', 'h.relu()', 'torch.relu(h)', 'F.leaky_relu(h, 0.1)'])}")
    elif kind == "relu":
        b.emit(f"h = {b.layer('nn.ReLU()')}(h)")
    elif kind == "act":
        b.emit(f"h = {b.choose(['torch.tanh(h)', 'torch.sigmoid(h)', 'F.leaky_relu(h, 0.2)'])}")
    elif kind == "pool":
        b.emit(f"h = {b.layer(b.choose(['nn.AvgPool2d(2)', 'nn.MaxPool2d(2)', 'nn.AdaptiveAvgPool2d(2)']))}(h)")
    elif kind == "norm":
        b.emit(f"h = {b.layer(f'nn.BatchNorm2d({c})')}(h)")
    elif kind == "residual":
        b.emit(f"h = h + 0.5 * {_conv(b, c, same=True)}(h)")
    elif kind == "cat":
        b.emit(f"h = torch.cat([h, {_conv(b, 2, same=True)}(h)], 1)")
    elif kind == "pad":
        b.emit("h = F.pad(h, (1, 0, 0, 1))")
    else:
        b.emit("h = h[:, :, 1:]")


def _vector_step(b: Builder) -> None:
    (width,) = b.shape
    kind = b.choose(["linear"] * 4 + ["relu", "act", "residual", "cat", "index", "reshape"])
    if kind == "linear":
        b.emit(f"h = {b.layer(f'nn.Linear({width}, {int(b.rng.integers(3, 9))})')}(h)")
        b.emit(f"h = {b.choose(['F.relu(h)', 'h.relu()', 'torch.tanh(h)'])}")
    elif kind == "relu":
        b.emit(f"h = {b.layer('nn.ReLU()')}(h)")
    elif kind == "act":
        b.emit(f"h = {b.choose(['torch.tanh(h)', 'torch.sigmoid(h)'])}")
    elif kind == "residual":
        b.emit(f"h = h + {b.layer(f'nn.Linear({width}, {width})')}(h)")
    elif kind == "cat":
        b.emit(f"h = torch.cat([h, {b.layer(f'nn.Linear({width}, 3)')}(h)], 1)")
    elif kind == "index":
        b.emit("h = h[:, 1:]" if width > 2 else "h = h[:, :]")
    else:
        b.emit("h = h.reshape(h.shape[0], -1)")


def _calibrate(b: Builder) -> None:
    """Shift the last bias so that the first image is at the wanted distance from another class, to first order."""
    x = b.images[:1].double().requires_grad_(True)
    logits = b.value("h", x)[0]
    top = int(b.rng.integers(0, min(2, b.classes)))
    slopes = [torch.autograd.grad(logits[top] - z, x, retain_graph=True)[0].norm() for z in logits]
    margin = b.distance * max(float(max(slopes)), 1e-3)
    b.offset = [round(float(-z) + margin * (k == top), 6) for k, z in enumerate(logits.detach())]


def build(seed: int, kinds: tuple[str, ...] | None = None) -> Case:
    """Draw the model of a seed.

    Args:
        seed: decides everything.
        kinds: traps to put in, instead of those that the seed draws; () for none. All else stays as it was.
    """
    b = Builder(seed)
    images, vectors = int(b.rng.integers(0, 3)), int(b.rng.integers(0, 3))
    drawn = _kinds(b) if kinds is None else kinds
    # A stream of their own: the rest of the model is the same without traps.
    own = np.random.default_rng([seed, 1])
    places = {kind: traps.TABLE[kind].phase or ("image", "vector", "logits", "logits")[own.integers(4)] for kind in drawn}

    def insert(phase: str) -> None:
        kept, b.rng = b.rng, own
        for kind, place in places.items():
            if place == phase:
                traps.TABLE[kind].write(b)
        b.rng = kept

    def steps(phase: str, count: int, step: Callable[[Builder], None]) -> None:
        at = int(b.rng.integers(0, count + 1))
        for number in range(count + 1):
            if number == at:
                insert(phase)
            if number < count:
                step(b)

    steps("image", images, _image_step)
    b.emit(b.choose(["h = h.flatten(1)", "h = torch.flatten(h, 1)", "h = h.reshape(h.shape[0], -1)"]))
    steps("vector", vectors, _vector_step)
    b.emit(f"h = {b.layer(f'nn.Linear({b.shape[0]}, {b.classes})', 'last')}(h)")
    _calibrate(b)
    insert("logits")
    return Case(seed, b.source(), b.images, b.classes, b.mean, b.std, tuple(places), tuple(b.layers), b.distance)


def _kinds(b: Builder) -> tuple[str, ...]:
    """Return the traps of a seed: none for every fourth, otherwise each kind in turn, the families mixed, and seldom a second."""
    families = [kind.split(":")[0] for kind in traps.TABLE]
    names = [kind for _, kind in sorted((families[:i].count(families[i]), kind) for i, kind in enumerate(traps.TABLE))]
    second = (b.choose(names),) if b.rng.random() < 0.15 else ()
    return () if b.seed % 4 == 0 else (names[(b.seed - b.seed // 4 - 1) % len(names)], *second)


def cases(count: int, start: int = 0) -> Iterator[Case]:
    """Yield the cases of a range of seeds."""
    return (build(seed) for seed in range(start, start + count))
