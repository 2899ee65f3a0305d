"""Which line of the user's code is running."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
import traceback
from pathlib import Path

import numpy as np
import torch

import rsplugins

_LIBRARIES = tuple(f"{Path(package.__file__ or '').parent}/" for package in (torch, np))
_OWN = f"{Path(rsplugins.__file__).parent}/"
_OWN_MODELS = f"{_OWN}models/"
_STANDARD = tuple(f"{sysconfig.get_paths()[key]}/" for key in ("stdlib", "platstdlib"))
_INSTALLED = ("/site-packages/", "/dist-packages/")


def is_foreign(file: str) -> bool:
    """Return whether a file holds a model's code: not that of torch, numpy, the standard library, auto-LiRPA or this package."""
    if file.startswith((*_LIBRARIES, "<frozen")) or "/auto_LiRPA/" in file:
        return False
    if file.startswith(_OWN):
        return file.startswith(_OWN_MODELS)
    return not file.startswith(_STANDARD) or any(part in file for part in _INSTALLED)


def current() -> str:
    """Return ``file:line: text`` of the innermost frame that is a model's own code; nothing when there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_foreign(frame.f_code.co_filename):
            return shown(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def shown(file: str, line: int) -> str:
    """Return ``file:line: text``, without the text where the file is not at hand."""
    text = linecache.getline(file, line).strip()
    return f"{file}:{line}" + (f": {text}" if text else "")


def of_stack(stack: str) -> str:
    """Return ``file:line: text`` from a stack as text, innermost first (TorchScript) or last (torch.fx); or nothing."""
    found = re.findall(r"^(.+)\((\d+)\): ", stack, re.MULTILINE) or re.findall(r'File "(.+)", line (\d+)', stack)[::-1]
    return next((shown(file, int(line)) for file, line in found if is_foreign(file)), "")


def of_error(error: BaseException) -> str:
    """Return ``file:line: text`` of the innermost of a model's own frames that an error went through; nothing without one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_foreign(frame.filename)]
    return shown(frames[-1].filename, frames[-1].lineno or 0) if frames else ""


def place(line: str) -> str:
    """Return ``" at file:line: text"``, or nothing where no line is known."""
    return f" at {line}" if line else ""
