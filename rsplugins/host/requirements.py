"""Optional dependencies: which are missing, found without importing them, and the line that installs them."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_WITHOUT_DEPENDENCIES = {"auto-lirpa": ("appdirs", "setuptools")}
"""Distributions whose declared dependencies pip cannot satisfy beside ours, and the few modules they really import besides what
this package already brings. The registry's auto-LiRPA 0.3 declares torch < 1.13 and yet runs on today's (rsplugins.compat)."""


def unmet(requires: Sequence[str]) -> list[Requirement]:
    """Return the requirements that the installed distributions do not meet.

    Args:
        requires: requirement strings such as ``"auto-LiRPA>=0.3"``; those whose marker does not hold here count as met.

    Raises:
        packaging.requirements.InvalidRequirement: (a ValueError) when a string is malformed.

    Example:
        >>> [str(need) for need in unmet(["pluggy>=1", "pluggy>=999", "no-such-thing; python_version < '3'"])]
        ['pluggy>=999']
    """
    if not requires:
        return []
    # packaging costs a tenth of the time that a listing may take, and most plugins have no optional dependency
    from packaging.requirements import Requirement

    needs = [Requirement(text) for text in requires]
    return [need for need in needs if (need.marker is None or need.marker.evaluate()) and not _is_met(need)]


def _is_met(need: Requirement) -> bool:
    version = _installed(need.name)
    return version is not None and need.specifier.contains(version, prereleases=True)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_text(needs: Sequence[Requirement]) -> str:
    """Return one sentence: what is not installed, and what is installed in the wrong version."""
    parts = []
    for need in needs:
        version = _installed(need.name)
        parts.append(f"{need} is not installed" if version is None else f"{need} is needed, but {version} is installed")
    return "; ".join(parts)


def install_line(needs: Sequence[Requirement]) -> str:
    """Return the shell line that installs the requirements: an extra of this package where one covers them all.

    Example:
        >>> from packaging.requirements import Requirement
        >>> install_line([Requirement("auto-LiRPA>=0.3")])
        "pip install --no-deps 'auto-LiRPA>=0.3' appdirs setuptools"
    """
    from packaging.utils import canonicalize_name

    names = {canonicalize_name(need.name) for need in needs}
    for extra, covered in _extras().items():
        if names <= covered:
            return f"pip install 'rsplugins[{extra}]'"
    ordinary, lines = [], []
    for need in needs:
        bare = _bare(need)
        helpers = _WITHOUT_DEPENDENCIES.get(canonicalize_name(need.name))
        if helpers is None:
            ordinary.append(bare)
        else:
            lines.append(f"pip install --no-deps {' '.join([bare, *helpers])}")
    if ordinary:
        lines.insert(0, f"pip install {' '.join(ordinary)}")
    return " && ".join(lines)


def _bare(need: Requirement) -> str:
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return shlex.quote(f"{need.name}{extras}{' @ ' + need.url if need.url else need.specifier}")


def _extras() -> dict[str, set[str]]:
    """The distributions that each extra of this package adds, read from its installed metadata."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        lines = importlib.metadata.requires("rsplugins") or []
        extras = importlib.metadata.metadata("rsplugins").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # run from a bare checkout
        return {}
    marked = [need for need in map(Requirement, lines) if need.marker is not None and not need.marker.evaluate({"extra": ""})]
    return {
        extra: {canonicalize_name(need.name) for need in marked if need.marker and need.marker.evaluate({"extra": extra})}
        for extra in extras
    }
