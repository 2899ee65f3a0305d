"""Bridges to stale releases of dependencies. Each says which versions it is for, and does nothing outside them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def robustbench_imports() -> Iterator[None]:
    """Make ``import robustbench`` work with today's packages, inside a ``with`` block.

    For robustbench 1.1 (all releases up to 1.1.1, where it was seen).
    """
    alias_autoattack()
    with _pkg_resources(), warnings.catch_warnings():
        # It imports timm and setuptools by names they have deprecated; nothing a user could do about it.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        yield


def alias_autoattack() -> None:
    """Give ``pyautoattack`` the name ``autoattack`` that robustbench and many scripts import.

    The registry carries AutoAttack as pyautoattack (0.2.0 was seen); where ``autoattack`` itself is installed, or neither is,
    nothing happens.
    """
    if _importable("autoattack") or not _importable("pyautoattack"):
        return
    for suffix in ("", ".state"):
        sys.modules[f"autoattack{suffix}"] = importlib.import_module(f"pyautoattack{suffix}")


@contextlib.contextmanager
def _pkg_resources() -> Iterator[None]:
    """Stand in for ``pkg_resources``, which setuptools 81 removed, while robustbench 1.1 is imported.

    Taken away again afterwards: other packages look at whether it is there. The one function that robustbench calls later is
    ``resource_filename``.
    """
    if _importable("pkg_resources"):
        yield
        return
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = _resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def _resource_filename(name: str, path: str) -> str:
    module = importlib.import_module(name)
    package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
    return str(importlib.resources.files(package) / path)


def _importable(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ValueError:  # a module put into sys.modules by hand
        return True
