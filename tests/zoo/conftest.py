from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rsplugins.models.store import DEFAULT_MODEL

ZOO = Path(__file__).resolve().parents[2] / "zoo"


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded default that a test may damage."""
    return Path(shutil.copytree(ZOO / DEFAULT_MODEL, tmp_path / "copy" / DEFAULT_MODEL))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty zoo of one's own, which `zoo:` looks at first."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("RSPLUGINS_ZOO", str(folder))
    return folder
