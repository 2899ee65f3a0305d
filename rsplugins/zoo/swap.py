"""Change a folder of the zoo as a whole: whatever interrupts it, what is there is the old folder or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGING = ".staging-"
_HERE, _EXCHANGE = -100, 2


@contextmanager
def rebuilt(folder: Path) -> Iterator[Path]:
    """Give a copy of a folder to change; it takes the folder's place at the end, or is dropped.

    Args:
        folder: of a model; it need not exist.

    Yields:
        The copy, which has the folder's name; empty when there is no such folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    # One level deeper than models lie, so that a copy which a kill left behind is not taken for one.
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{folder.name}-", dir=folder.parent))
    try:
        copy = staging / folder.name
        if folder.is_dir():
            shutil.copytree(folder, copy)
        else:
            copy.mkdir()
        yield copy
        _take_place(copy, folder, staging / "old")
    finally:
        if folder.exists() or not (staging / "old").exists():
            shutil.rmtree(staging, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put a folder back that a kill between two renames left in its staging place, where folders cannot be exchanged at once."""
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f"{STAGING}{folder.name}-*/old")):
        with suppress(OSError):
            old.rename(folder)
            shutil.rmtree(old.parent, ignore_errors=True)
            return


def _take_place(new: Path, place: Path, aside: Path) -> None:
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        place.rename(aside)
        try:
            new.rename(place)
        except BaseException:
            aside.rename(place)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step of the file system; return whether that can be done here."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
