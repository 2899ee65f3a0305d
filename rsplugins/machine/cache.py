"""Small facts that take long to find out, kept under the user's cache directory; deleting them costs time and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsplugins.machine.files import write_whole
from rsplugins.provenance import version

if TYPE_CHECKING:
    from torch import Tensor

_KNOWN: dict[Path, Any] = {}


def home() -> Path:
    """Return the directory: ``$XDG_CACHE_HOME/rsplugins``, or ``~/.cache/rsplugins``; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rsplugins"


def recall(kind: str, *key: Any) -> Any:
    """Return what :func:`keep` was given under a key by this version of rsplugins, or None.

    A file that was edited, moved or cut is not believed.
    """
    path, said = _path(kind, key)
    if path not in _KNOWN and _names_its_code():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["seal"] == _seal(said, found["value"]):  # of another key, or of an edited value, the seal is another
                _KNOWN[path] = found["value"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    return _KNOWN.get(path)


def keep(value: Any, kind: str, *key: Any) -> None:
    """Keep a JSON value under a key; where nothing can be written, and in a checkout with changes, for this process alone."""
    path, said = _path(kind, key)
    _KNOWN[path] = value
    if _names_its_code():
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"key": said, "value": value, "seal": _seal(said, value)}) + "\n")


def _names_its_code() -> bool:
    """Whether the version tells this code from any other: what changed code found out is not what this code would."""
    return not version().endswith((".dirty", "+unknown"))


def _seal(key: list[str], value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()


def fingerprint(tensor: Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and bytes, as a part of a key."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path(kind: str, key: tuple[Any, ...]) -> tuple[Path, list[str]]:
    said = [version(), *map(str, key)]
    return home() / kind / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]}.json", said
