"""Files of checkpoints, looked at without torch: their hash, and whether they are what they should be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rsplugins.errors import CheckpointError

HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path) -> None:
    """Raise a CheckpointError when a file is empty, a web page, or a Git LFS pointer instead of a checkpoint."""
    if path.is_file():
        with path.open("rb") as file:
            check_head(file.read(256), str(path))


def check_head(head: bytes, name: str) -> None:
    """Do as :func:`check_file` with a file's first bytes.

    Args:
        head: 256 bytes, or all of a shorter file.
        name: what the error calls it.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{name} is empty.", cause="an interrupted download.", fix="Delete it and get it again.")
    if text.startswith(HTML):
        raise CheckpointError(
            f"{name} is an HTML page, not a checkpoint.",
            cause="the download returned a web page: a quota, a login, or a confirmation (shared drives do that).",
            fix="Delete it, open its address in a browser, and save the file itself.",
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not a checkpoint.",
            cause="the repository was cloned without Git LFS.",
            fix="Run `git lfs install` and `git lfs pull` in that repository.",
        )


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensor names to dtype, shape and byte range.

    Raises:
        CheckpointError: it is not a safetensors file, or is shorter than its header says.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != path.stat().st_size:
            raise ValueError("its length is not what the header says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.", fix="Get it again.") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
