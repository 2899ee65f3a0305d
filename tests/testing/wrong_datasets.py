"""Data sets with one mistake each."""

from __future__ import annotations

import itertools

import torch

from rsplugins.data import Dataset
from rsplugins.errors import ParameterError


def build(*, split="test", kind=Dataset, read=None, **changes):
    if split not in ("train", "test"):
        raise ParameterError(f"There is no split {split!r}.")

    def image(index):
        return torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(index))

    given = {"name": "wrong", "labels": [index % 3 for index in range(20)], "num_classes": 3, "input_size": (1, 4, 4)}
    return kind(split=split, read=read(image) if read else image, **{**given, **changes})


def right(reference="x", *, root=None, split="test", input_size=None):
    """Without a mistake."""
    return build(split=split)


def changed(**changes):
    def load(reference="x", *, root=None, split="test", input_size=None):
        return build(split=split, **changes)

    return load


class Longer(Dataset):
    def __len__(self):
        return len(self.labels) + 1


class OtherLabels(Dataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, (label + 1) % 3


class Wraps(Dataset):
    def __getitem__(self, index):
        return super().__getitem__(index % len(self))


_calls = itertools.count()


def _kept(image):
    kept = {}
    return lambda index: kept.setdefault(index, image(index))


def any_split(reference="x", *, root=None, split="test", input_size=None):
    data = build()
    data.split = split
    return data


def any_option(reference="x", *, root=None, split="test", input_size=None, **options):
    return build(split=split)


class _Digest(Dataset):
    def fingerprint(self):
        return str(next(_calls))


bytes_ = changed(read=lambda image: lambda index: image(index) * 255)
normalised = changed(read=lambda image: lambda index: image(index) - 0.5)
twice = changed(read=lambda image: lambda index: image(index) / 255)
double = changed(read=lambda image: lambda index: image(index).double())
integers = changed(read=lambda image: lambda index: (image(index) * 255).byte())
nan = changed(read=lambda image: lambda index: image(index) * float("nan"))
shape = changed(read=lambda image: lambda index: image(index)[0])
size = changed(input_size=(1, 5, 5))
too_many = changed(num_classes=2)
negative = changed(labels=[-1, 0, 1] * 5)
names = changed(classes=["a", "b"])
empty = changed(labels=[])
renamed = changed(name="another")
random = changed(read=lambda image: lambda index: torch.rand(1, 4, 4))
counted = changed(read=lambda image: lambda index: image(next(_calls)))
shared = changed(read=_kept)
longer = changed(kind=Longer)
other_labels = changed(kind=OtherLabels)
wraps = changed(kind=Wraps)
digest = changed(kind=_Digest)


def by_load(reference="x", *, root=None, split="test", input_size=None):
    start = 1000 * next(_calls)
    return build(split=split, read=lambda image: lambda index: image(start + index))


def order(reference="x", *, root=None, split="test", input_size=None):
    start = next(_calls)
    return build(split=split, labels=[(start + index) % 3 for index in range(20)])
