"""Which rsplugins this is, and on which processor: what every recorded number carries. The standard library alone.

The build (``[tool.hatch.version]`` in pyproject.toml) and the running package ask the same function, so that there is one value:

* in a checkout ``0.1.0+gCOMMIT``, with ``.dirty`` behind it when files of the package differ from that commit;
* at a commit that carries the tag ``v0.1.0``: ``0.1.0``;
* in an installed wheel: what the build found;
* in a source tree without git: ``0.1.0+unknown``, never the version of something else that is installed.

The number before the plus stands here alone. It does not come from tags: shallow clones have none, and a development version that
a tool makes up without them (0.1.dev7) would be older than the 0.1 that plugins ask for.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

RELEASE = "0.1.0"
NOT_RECORDED = "not recorded"
_DISTRIBUTIONS = ("torch", "torchvision", "numpy", "scipy", "timm", "auto-LiRPA", "robustbench")
_PACKAGE = Path(__file__).resolve().parent


def source_version(root: Path | None = None) -> str:
    """Return the version of a source tree.

    Args:
        root: the folder that holds ``pyproject.toml`` and ``rsplugins/``; by default the one this file lies in.
    """
    root = _PACKAGE.parent if root is None else root
    if (root / ".git").exists():  # a file in a worktree
        return _of_checkout(root)
    return _of_sdist(root) or f"{RELEASE}+unknown"


def _of_checkout(root: Path) -> str:
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return f"{RELEASE}+unknown"
    dirty = _git(root, "status", "--porcelain", "--", "rsplugins", "pyproject.toml")
    if not dirty and f"v{RELEASE}" in (_git(root, "tag", "--points-at", "HEAD") or "").split():
        return RELEASE
    return f"{RELEASE}+g{commit}" + (".dirty" if dirty or dirty is None else "")


def _git(root: Path, *words: str) -> str | None:
    """Return what git prints, or None where it cannot be asked."""
    # In a container the checkout often belongs to another user, which git would not read otherwise.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_sdist(root: Path) -> str:
    """Return the version that an unpacked source distribution says, or nothing."""
    path = root / "PKG-INFO"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Version:")), "")


@functools.cache
def version() -> str:
    """Return the version of the package that is running: of its source tree where it runs from one, else the installed one."""
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return source_version()
    import importlib.metadata

    try:
        return importlib.metadata.version("rsplugins")
    except importlib.metadata.PackageNotFoundError:
        return f"{RELEASE}+unknown"


@functools.cache
def processor() -> str:
    """Return the name of this machine's processor, such as ``"AMD EPYC 7B13"``; its kind where the name is not known."""
    cpuinfo = Path("/proc/cpuinfo")
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine() or NOT_RECORDED


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed distributions that a result can depend on, without importing them."""
    return {"python": platform.python_version(), "rsplugins": version(), **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
