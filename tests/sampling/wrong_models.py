"""Models that are no functions of one image: each mixes its batch, remembers its calls, or throws dice."""

from __future__ import annotations

import collections
import itertools
import random
import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SHAPE, K = (1, 4, 4), 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lin = nn.Linear(16, K)
        self.lin.weight.data = torch.randn(K, 16, generator=generator)
        self.lin.bias.data = -0.5 * self.lin.weight.data.sum(1)

    def logits(self, x):
        return self.lin(x.flatten(1))

    def forward(self, x):
        return self.change(self.logits(x), x)


# -- mixing ---------------------------------------------------------------------------------------------------------------------


class Mean(Base):
    def change(self, z, x):
        return z.mean(0, keepdim=True).expand_as(z) + 0 * z


class ALittle(Base):
    def change(self, z, x):
        return z + 1e-5 * z.mean(0)


class AboveSixteen(Base):
    def change(self, z, x):
        return z + 0.1 * z.mean(0) if len(x) > 16 else z


class OnlyFullBatches(Base):
    def change(self, z, x):
        return z + 0.1 * z.mean(0) if len(x) == 40 else z


class Largest(Base):
    def change(self, z, x):
        return z - 0.05 * z.amax()


class LargestPixel(Base):
    def forward(self, x):
        return self.logits(x / (1 + 0.05 * x.abs().amax()))


class Sorted(Base):
    def change(self, z, x):
        return z.sort(0).values


class Turned(Base):
    def change(self, z, x):
        return z.flip(0)


class Neighbour(Base):
    def change(self, z, x):
        return z + 0.01 * z.roll(1, 0)


class SoftmaxOverBatch(Base):
    def change(self, z, x):
        return z.softmax(0)


class ArgmaxOverBatch(Base):
    def change(self, z, x):
        return z + F.one_hot(z.argmax(0), len(z)).T.float()


class BatchStatistics(Base):
    def change(self, z, x):
        return F.batch_norm(z, None, None, training=True) if len(z) > 1 else z


class TrainsItsNorm(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(K, momentum=0.0)

    def change(self, z, x):
        self.norm.train()
        z = self.norm(z) if len(z) > 1 else z
        self.norm.eval()
        return z


class GhostNorm(Base):
    def change(self, z, x):
        parts = [part - part.mean(0) if len(part) == 4 else part for part in z.split(4)]
        return torch.cat(parts)


class InstanceOverBatch(Base):
    def forward(self, x):
        return self.logits((x - x.mean(0)) / (1 + x.std(0, unbiased=False)))


class NearTies(Base):
    def change(self, z, x):
        top = z.topk(2, dim=1).values
        near = (top[:, :1] - top[:, 1:]) < 0.05
        return torch.where(near, z + 0.2 * z.mean(0), z)


class Place(Base):
    def change(self, z, x):
        return z + 0.1 * torch.arange(len(z))[:, None] * torch.tensor([1.0, -1.0, 0.0])


class Size(Base):
    def change(self, z, x):
        return z * len(z) + torch.tensor([0.0, 1.0, 0.0]) * len(z)


class OneScale(Base):
    def forward(self, x):
        scale = x.abs().max().clamp_min(1e-3) / 127
        return self.logits(torch.round(x / scale) * scale)


MIXING = [Mean, ALittle, AboveSixteen, OnlyFullBatches, Largest, LargestPixel, Sorted, Turned, Neighbour, SoftmaxOverBatch]
MIXING += [ArgmaxOverBatch, BatchStatistics, TrainsItsNorm, GhostNorm, InstanceOverBatch, NearTies, Place, Size, OneScale]

# -- memory ---------------------------------------------------------------------------------------------------------------------

AFTER = 60
"""Calls after which the counters below begin to act."""
COUNT = 0
MEMORY = []
BOX = types.SimpleNamespace(count=0)


class Average(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(K))

    def change(self, z, x):
        self.mean.mul_(0.9).add_(0.1 * z.mean(0))
        return z - 0.5 * self.mean


class NewAverage(Average):
    def change(self, z, x):
        self.mean = 0.9 * self.mean + 0.1 * z.mean(0)
        return z - 0.5 * self.mean


class SilentAverage(Average):
    def change(self, z, x):
        self.mean.data.numpy()[:] = 0.9 * self.mean.numpy() + 0.1 * z.mean(0).numpy()
        return z


class PlainTensor(Base):
    def __init__(self):
        super().__init__()
        self.last = torch.zeros(K)

    def change(self, z, x):
        z, self.last = z + 0.01 * self.last, z.mean(0)
        return z


class MovesItsWeights(Base):
    def change(self, z, x):
        self.lin.bias.data += 1e-6
        return z


class Late(Base):
    def count(self):
        raise NotImplementedError

    def change(self, z, x):
        return -z if self.count() > AFTER else z


class Counter(Late):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def count(self):
        self.calls += 1
        return self.calls


class CounterBuffer(Late):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def count(self):
        self.calls += 1
        return int(self.calls)


class CounterDeep(Late):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity())
        self.inner[0].seen = {"calls": [0]}

    def count(self):
        self.inner[0].seen["calls"][0] += 1
        return self.inner[0].seen["calls"][0]


class CounterDeque(Late):
    def __init__(self):
        super().__init__()
        self.lengths = collections.deque(maxlen=1000)

    def count(self):
        self.lengths.append(1)
        return len(self.lengths)


class CounterIterator(Late):
    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()

    def count(self):
        return next(self.numbers)


class CounterArray(Late):
    def __init__(self):
        super().__init__()
        self.calls = np.zeros(1)

    def count(self):
        self.calls += 1
        return self.calls[0]


class Helper:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


class CounterObject(Late):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def count(self):
        return self.helper()


class CounterClass(Late):
    calls = 0

    def count(self):
        CounterClass.calls += 1
        return CounterClass.calls


class CounterGlobal(Late):
    def count(self):
        global COUNT
        COUNT += 1
        return COUNT


class CounterList(Late):
    def count(self):
        return counted()


def counted():
    MEMORY.append(1)
    return len(MEMORY)


class CounterNamespace(Late):
    def count(self):
        BOX.count += 1
        return BOX.count


class CounterDefault(Late):
    def count(self, calls=[]):  # noqa: B006 -- the mistake
        calls.append(1)
        return len(calls)


def closure():
    calls = 0

    class CounterClosure(Late):
        def count(self):
            nonlocal calls
            calls += 1
            return calls

    return CounterClosure()


def hooked():
    model, calls = Base(), []
    model.change = lambda z, x: z

    def hook(module, inputs, output):
        calls.append(1)
        return -output if len(calls) > AFTER else output

    model.register_forward_hook(hook)
    return model


def patched():
    model = Base()
    before = [torch.zeros(K)]

    def forward(x):
        z = model.logits(x)
        before[0], z = z.mean(0), z + 0.01 * before[0]
        return z

    model.forward = forward
    return model


class Dropout(Base):
    def change(self, z, x):
        return F.dropout(z, 0.1, training=True)


class Dice(Base):
    def change(self, z, x):
        return z + 1e-3 * torch.rand(1)


class PythonDice(Base):
    def change(self, z, x):
        return -z if random.random() < 1e-9 else z


class NumpyDice(Base):
    def change(self, z, x):
        return -z if np.random.rand() < 1e-9 else z


class OwnDice(Base):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def change(self, z, x):
        return -z if float(torch.rand(1, generator=self.generator)) < 1e-9 else z


class OwnNumpyDice(Base):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def change(self, z, x):
        return -z if self.generator.random() < 1e-9 else z


class FirstMean(Base):
    """Another function from its first call on: it keeps something of the first images, and nothing changes after that."""

    first = None

    def kept(self, mean):
        if self.first is None:
            self.first = mean
        return self.first

    def change(self, z, x):
        mean = x.mean(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0]
        return z - 5 * (mean - self.kept(mean[:1])) * z


class FirstInAList(FirstMean):
    def __init__(self):
        super().__init__()
        self.seen = []

    def kept(self, mean):
        if not self.seen:
            self.seen.append(mean)
        return self.seen[0]


class FirstInADict(FirstMean):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def kept(self, mean):
        return self.seen.setdefault("mean", mean)


class FirstInABuffer(FirstMean):
    def __init__(self):
        super().__init__()
        self.register_buffer("calibrated", torch.zeros(()))
        self.register_buffer("offset", torch.zeros(1, 1))

    def kept(self, mean):
        self.offset = torch.where(self.calibrated > 0, self.offset, mean)
        self.calibrated.fill_(1)
        return self.offset


REMEMBERING = [Average, NewAverage, SilentAverage, PlainTensor, MovesItsWeights, Counter, CounterBuffer, CounterDeep]
REMEMBERING += [CounterDeque, CounterIterator, CounterArray, CounterObject, CounterClass, CounterGlobal, CounterList]
REMEMBERING += [CounterNamespace, CounterDefault, closure, hooked, patched]
FIRST = [FirstMean, FirstInAList, FirstInADict, FirstInABuffer]
REMEMBERING += FIRST
RANDOM = [Dropout, Dice, PythonDice, NumpyDice, OwnDice, OwnNumpyDice]
WRONG = {make.__name__: make for make in (*MIXING, *REMEMBERING, *RANDOM)}
