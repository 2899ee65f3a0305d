"""What every test starts from: a cache of its own run, not the user's."""

from __future__ import annotations

import uuid

import pytest

from rsplugins.machine import cache


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """Let nothing that a test keeps be recalled by another, or by the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))
    monkeypatch.setattr(cache, "_KNOWN", {})
