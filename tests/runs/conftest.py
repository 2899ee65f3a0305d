from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "tinyplugin"
collect_ignore = ["tinyplugin"]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """A folder that holds the metadata of an installed distribution `tiny`, whose modules lie beside this file."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "tiny-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[rsplugins]\ntiny = tiny_plugin\n")
    return [str(folder), str(HERE)]


@pytest.fixture
def tiny(tiny_path, monkeypatch):
    """Install the tiny plugin, alone, in this process; return the host."""
    from rsplugins.host import get_host

    for path in tiny_path:
        monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("RSPLUGINS_LOAD", "tiny")
    get_host.cache_clear()
    yield get_host()
    get_host.cache_clear()


@pytest.fixture
def environment(tiny_path):
    """The environment of a subprocess that has the tiny plugin."""
    path = os.pathsep.join([*tiny_path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).strip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "RSPLUGINS_LOAD": "tiny", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(environment, tmp_path):
    """Run the real command line in tmp_path."""

    def run(*arguments, **more):
        line = [sys.executable, "-c", "from rsplugins.cli import main; main()", *map(str, arguments)]
        return subprocess.run(line, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture
def make_run(tiny, tmp_path, monkeypatch):
    """Certify tiny data in this process: make_run(name, method, indices=..., **parameters) -> Run; pages=True draws them."""
    from rsplugins.certification import prepare
    from rsplugins.certifier import Execution
    from rsplugins.data import load as load_data
    from rsplugins.models import load
    from rsplugins.runs import merge
    from rsplugins.runs.execute import execute

    write_pages = merge.write_pages

    def make(
        name,
        method="votes",
        *,
        indices=None,
        seed=0,
        model="tiny:x",
        data="tiny",
        shard=None,
        conclude=True,
        options=None,
        pages=False,
        **parameters,
    ):
        monkeypatch.setattr(merge, "write_pages", write_pages if pages else lambda run: None)
        entry = tiny.find("certifier", method)
        certifier = prepare(entry, load(model, **(options or {})), parameters, Execution(seed=seed))
        dataset = load_data(data)
        indices = list(range(len(dataset))) if indices is None else indices
        return execute(
            entry, certifier, dataset, indices, tmp_path / name, shard=shard, conclude=conclude, model=model, data=data
        )

    return make
