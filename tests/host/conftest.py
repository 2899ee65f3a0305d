"""Plugins as real distributions: a module and a dist-info folder on sys.path, found by the machinery of importlib.metadata."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rsplugins.host import get_host

GOOD = """
    import rsplugins

    @rsplugins.hookimpl
    def rsplugins_certifiers():
        return [
            rsplugins.CertifierDescriptor(
                name="{name}", summary="a plugin that works", factory="{module}_heavy:Method", claim="{module}_heavy:claim",
                guarantee=rsplugins.Guarantee.DETERMINISTIC, norms=(rsplugins.Norm.LINF, rsplugins.Norm.L2), requires={requires},
            )
        ]
"""


@pytest.fixture
def good() -> Callable[..., str]:
    """Source of a plugin that brings one certifier called ``name``: ``good(name, module=name, requires=())``."""

    def source(name: str, module: str = "", requires: tuple[str, ...] = ()) -> str:
        return textwrap.dedent(GOOD.format(name=name, module=module or name.replace("-", "_"), requires=repr(requires)))

    return source


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution: ``install(name, source, version="1.2", point=None, extra={file name: source})``."""
    for variable in ("RSPLUGINS_STRICT", "RSPLUGINS_LOAD"):
        monkeypatch.delenv(variable, raising=False)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(
        name: str, source: str, *, version: str = "1.2", point: str = "", value: str = "", extra: dict[str, str] | None = None
    ) -> Path:
        module = name.replace("-", "_")
        for file, text in {f"{module}.py": source, **(extra or {})}.items():
            (site / file).write_text(textwrap.dedent(text))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[rsplugins]\n{point or name} = {value or module}\n")
        importlib.invalidate_caches()
        return site

    get_host.cache_clear()
    yield write
    get_host.cache_clear()
    for key, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(site)):
            del sys.modules[key]
