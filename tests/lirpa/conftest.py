"""Fixtures; without auto-LiRPA there is nothing here to test."""

import importlib.util

import pytest
import torch

from tests.lirpa.cases import NETWORKS, D, settle

if importlib.util.find_spec("auto_LiRPA") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=NETWORKS)
def network(request):
    """A float64 network from (B, 2, 6, 6) to (B, 5), in eval mode."""
    return settle(NETWORKS[request.param]())


@pytest.fixture
def images():
    return torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=D)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small run best on one thread, the more so on a busy machine."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)
