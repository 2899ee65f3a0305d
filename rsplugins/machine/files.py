"""Whole-file writes that are seen complete or not at all, and a lock that a killed process lets go of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rsplugins.errors import RunError

try:
    import fcntl
except ImportError:  # not on Windows, where two writers to one run are then not noticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def whole(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing so that a reader sees all of it or nothing, whatever is killed.

    Args:
        path: the file; it is there at the end of the block, and as it was before after an error in it.
        replace: whether an existing file is replaced; otherwise :class:`FileExistsError` is raised at the end of the block.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        if replace:
            Path(name).replace(path)
        else:
            os.link(name, path)  # fails, and stays whole, when somebody else was first
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


def write_whole(path: Path, contents: str | bytes | Iterable[str], *, replace: bool = True) -> bool:
    """Write a file so that a reader sees all of it or nothing, whatever is killed.

    Args:
        path: the file.
        contents: text (written as UTF-8), bytes, or parts of a text, written one by one.
        replace: whether an existing file is replaced; otherwise it stays.

    Returns:
        Whether this call wrote the file.
    """
    try:
        with whole(path, replace=replace) as file:
            parts = [contents] if isinstance(contents, (str, bytes)) else contents
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
    except FileExistsError:
        return False
    return True


def lock(file: IO[Any], path: Path) -> None:
    """Take the lock of an open file until it is closed or this process ends.

    Raises:
        RunError: another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"another process is writing {path}",
            cause="the same run was started twice",
            fix="wait for it, stop it, or give this one another --out; to share the work use --shard 0/2 and --shard 1/2",
        ) from None


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory's lock for the block; waits for another process that holds it."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
