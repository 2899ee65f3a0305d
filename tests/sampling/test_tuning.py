import types

import pytest
import torch
from torch import nn

from rsplugins.machine.device import is_out_of_memory
from rsplugins.sampling import tuning


def rows(count):
    return torch.zeros(count, 4)


@pytest.fixture
def clock(monkeypatch):
    """The time as tuning sees it: only what a machine spends passes, so no other process can change a choice."""
    now = [0.0]
    monkeypatch.setattr(tuning, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def machine(clock, seconds_for):
    """A model whose time is a function of the batch size."""

    def forward(x):
        clock[0] += seconds_for(len(x))
        return x

    return forward


def test_the_fastest_micro_batch_is_found(clock):
    # Overhead of 2 ms a call, and a cache that ends at 64 rows.
    forward = machine(clock, lambda n: 0.002 + n * (1e-5 if n <= 64 else 2e-4))
    assert tuning.best_batch_size(forward, rows) == 64


def test_the_search_begins_no_candidate_that_would_pass_the_limit(clock):
    # Two rounds of 8 rows take .32 s; with those of 16 rows it would be .96.
    assert tuning.best_batch_size(machine(clock, lambda n: 0.02 * n), rows, seconds=0.5) == 8
    assert clock[0] == pytest.approx(0.32)


def test_the_search_ends_where_memory_does(clock):
    def forward(x):
        if len(x) > 32:
            raise RuntimeError("CUDA out of memory")
        clock[0] += 0.002

    assert tuning.best_batch_size(forward, rows) == 32


def test_other_errors_are_not_swallowed():
    def forward(x):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        tuning.best_batch_size(forward, rows)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("x"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def test_convolutions_want_channels_last_and_linear_layers_do_not():
    assert tuning.prefers_channels_last(nn.Sequential(nn.Conv2d(1, 1, 3)))
    assert not tuning.prefers_channels_last(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))
    batch = tuning.empty_batch(2, (3, 4, 5), channels_last=True, dtype=torch.float32, device=torch.device("cpu"))
    assert batch.stride() == (60, 1, 15, 3)
    video = tuning.empty_batch(2, (3, 2, 4, 5), channels_last=True, dtype=torch.float32, device=torch.device("cpu"))
    assert video.is_contiguous()
