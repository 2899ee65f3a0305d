"""Where the models of the zoo are: a folder of one's own, the checkout, the copy inside the wheel, what was fetched."""

from __future__ import annotations

import os
from pathlib import Path

from rsplugins.errors import UnknownNameError, UsageError
from rsplugins.models.manifest import FILE

DEFAULT_MODEL = "digits-cnn.digits-gaussian025-v2"
"""What is certified when nobody names a model: it travels inside the wheel."""

_PACKAGE = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """Return the folder of models that were fetched, when there is no ``RSPLUGINS_ZOO``; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rsplugins" / "zoo"


def places() -> list[Path]:
    """Return the folders that are searched: ``RSPLUGINS_ZOO``, the checkout's ``zoo/``, the embedded copy, the cache.

    What was fetched comes last, so that a model from elsewhere never takes the name of one that came with the package.

    Raises:
        UsageError: ``RSPLUGINS_ZOO`` names no folder.
    """
    found: list[Path] = []
    own = os.environ.get("RSPLUGINS_ZOO")
    if own:
        if not Path(own).is_dir():
            raise UsageError(f"RSPLUGINS_ZOO is {own!r}, which is no folder.", fix="Point it at a folder of models, or unset it.")
        found.append(Path(own))
    # Beside an installed package stands site-packages, where a folder `zoo` would be somebody else's.
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        found.append(_PACKAGE.parent / "zoo")
    found += [_PACKAGE / "zoo" / "embedded", cache()]
    return [place for place in found if place.is_dir()]


def folders() -> dict[str, Path]:
    """Return the folder of every model by id; the first place that has an id wins."""
    found: dict[str, Path] = {}
    for place in places():
        for manifest in sorted(place.glob(f"*/{FILE}")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def find(identifier: str) -> Path:
    """Return the folder of a model.

    Raises:
        UnknownNameError: with a did-you-mean.
    """
    known = folders()
    if identifier not in known:
        raise UnknownNameError("zoo model", identifier, known)
    return known[identifier]
