"""What is kept is recalled by the same key alone, survives a process, and is worth nothing but time."""

from __future__ import annotations

import shutil

import pytest
import torch

import rsplugins
from rsplugins.certifier import Execution
from rsplugins.lipschitz import convolution
from rsplugins.machine import cache
from rsplugins.sampling import Draw, GaussianNoise, Sampler, engine, tuning


@pytest.fixture(autouse=True)
def released(monkeypatch):
    """Let this be a version that names its code: a checkout with changes keeps nothing on the disk."""
    monkeypatch.setattr(cache, "version", lambda: "0.1.0+g0123456789ab")


@pytest.fixture
def forgetful(monkeypatch):
    """A function that makes this process forget, as a new one has."""
    return lambda: monkeypatch.setattr(cache, "_KNOWN", {})


def test_a_value_is_recalled_by_its_key_in_another_process_too(forgetful):
    cache.keep([1, 0.1], "things", "a", 2)
    forgetful()
    assert cache.recall("things", "a", 2) == [1, 0.1]
    assert cache.recall("things", "a", 3) is None
    assert cache.recall("others", "a", 2) is None


def test_another_version_recalls_nothing(forgetful, monkeypatch):
    cache.keep(1, "things", "a")
    forgetful()
    monkeypatch.setattr(cache, "version", lambda: "0.0.0")
    assert cache.recall("things", "a") is None


@pytest.mark.parametrize("named", ["0.1.0+g0123456789ab.dirty", "0.1.0+unknown"])
def test_a_version_that_names_no_code_keeps_nothing_on_the_disk(forgetful, monkeypatch, named):
    monkeypatch.setattr(cache, "version", lambda: named)
    cache.keep(1, "things", "a")
    assert cache.recall("things", "a") == 1
    forgetful()
    assert cache.recall("things", "a") is None
    assert not cache.home().exists()


def test_an_edited_and_a_moved_file_are_not_believed(forgetful):
    cache.keep(2.5, "norms", "a")
    (path,) = (cache.home() / "norms").iterdir()
    whole = path.read_text()
    path.write_text(whole.replace("2.5", "0.5"))
    forgetful()
    assert cache.recall("norms", "a") is None
    path.write_text(whole)
    cache.keep(7.5, "norms", "b")
    (other,) = set((cache.home() / "norms").iterdir()) - {path}
    other.write_text(whole)
    forgetful()
    assert (cache.recall("norms", "a"), cache.recall("norms", "b")) == (2.5, None)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"value"'])
def test_a_damaged_file_and_a_place_that_cannot_be_written_cost_time_only(forgetful, monkeypatch, tmp_path, damage):
    cache.keep(1, "things", "a")
    (path,) = (cache.home() / "things").iterdir()
    path.write_text(damage)
    forgetful()
    assert cache.recall("things", "a") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.keep(2, "things", "a")
    assert cache.recall("things", "a") == 2  # for this process
    forgetful()
    assert cache.recall("things", "a") is None


def test_the_batch_is_measured_once_for_a_kind_of_work(forgetful, monkeypatch):
    measured = []
    monkeypatch.setattr(tuning, "_measured", lambda forward, make, seconds: measured.append(1) or 32)
    make = lambda rows: torch.zeros(rows, 3)  # noqa: E731
    for key in (("a", 1), ("a", 1), ("b", 1)):
        assert tuning.best_batch_size(torch.sin, make, key=key) == 32
    forgetful()
    tuning.best_batch_size(torch.sin, make, key=("a", 1))
    assert len(measured) == 2
    shutil.rmtree(cache.home())
    forgetful()
    tuning.best_batch_size(torch.sin, make, key=("a", 1))
    for _ in range(2):
        tuning.best_batch_size(torch.sin, make)  # of what nobody can tell again nothing is kept
    assert len(measured) == 5


def test_a_long_norm_is_computed_once_and_is_the_same(forgetful, monkeypatch):
    weight = torch.rand(16, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    make = lambda w: convolution.Convolution(w, (48, 48), (1, 1), ((1, 1), (1, 1)), (1, 1))  # noqa: E731
    first = make(weight).norm()
    forgetful()
    monkeypatch.setattr(convolution.Convolution, "_norm", lambda *_: pytest.fail("it was computed again"))
    assert make(weight.clone()).norm() == first
    with pytest.raises(pytest.fail.Exception):
        make(weight * (1 + 1e-15)).norm()


def model():
    torch.manual_seed(0)
    return rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), input_size=(1, 4, 4))


def test_a_function_that_was_checked_is_looked_at_and_not_tried_anew(monkeypatch):
    calls, check = [], engine.Guard._check
    monkeypatch.setattr(engine.Guard, "_check", lambda self, size, groups=None: calls.append(size) or check(self, size, groups))
    classifier, image = model(), torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))

    def program():
        tally = yield Draw(0, 500)
        return tally.votes()

    def sample(seed):
        sampler = Sampler(classifier, GaussianNoise(0.5, seed=seed), 3, Execution(batch_size=64))
        return next(iter(sampler.run([(0, image, program())]))).evidence

    first = sample(0)
    assert calls == [2, 7, 64]
    assert sample(0) == first
    assert calls == [2, 7, 64]
    with torch.no_grad():
        classifier.module[1].weight.data[0, 0] += 1.0  # no version counter moves
    assert sample(0) != first
    assert calls == [2, 7, 64] * 2


def test_a_tail_fills_its_batch_and_decides_nothing():
    classifier = model()
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    settings = {"sigma": 0.5, "n0": 10, "n": 333, "seed": 4}
    found = [rsplugins.certify(classifier, x, "gaussian", batch_size=size, **settings)[0].evidence for size in (7, 64, 100, 512)]
    assert found[1:] == found[:-1]
