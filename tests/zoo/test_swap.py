"""Whatever interrupts a change of a model's folder, what is there is the old one or the new one."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from rsplugins.zoo import swap
from rsplugins.zoo.add import add_evidence
from rsplugins.zoo.verify import verify


class Killed(BaseException):
    pass


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("step", range(8))
def test_an_interrupt_at_any_write_leaves_the_old_or_the_new(model, tmp_path, monkeypatch, step, at_once):
    source = Path(shutil.copytree(model / "records" / "gaussian", tmp_path / "source"))
    before, left = contents(model), [step]

    def interrupted(function):
        def call(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(
            "rsplugins.zoo.add.write_whole", interrupted(__import__("rsplugins.machine.files", fromlist=["x"]).write_whole)
        )
        patch.setattr(Path, "rename", interrupted(Path.rename))
        if not at_once:
            patch.setattr(swap, "_exchange", lambda one, other: False)
        with contextlib.suppress(Killed):
            add_evidence(model, source, "again")
    swap.recover(model)
    after = contents(model)
    assert after == before or "records/again/records.jsonl" in after
    assert verify(model, quick=True).problems == []


def test_evidence_that_is_refused_leaves_the_folder_as_it_was(model, tmp_path):
    source = Path(shutil.copytree(model / "records" / "gaussian", tmp_path / "source"))
    path = source / "manifest.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0', 1))
    before = contents(model)
    with pytest.raises(Exception, match="other weights"):
        add_evidence(model, source, "gaussian")
    assert contents(model) == before
    assert [found.name for found in model.parent.iterdir()] == [model.name]
