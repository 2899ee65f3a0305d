"""``rsplugins doctor``: what is installed, what is missing, and the lines that add it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from rsplugins.cli.output import print_json
from rsplugins.errors import RspluginsError
from rsplugins.host import Status, get_host
from rsplugins.host.requirements import install_line, missing_text, unmet
from rsplugins.provenance import version

_OPTIONAL = {
    "auto-LiRPA": ("bounds through whole networks", ("auto-LiRPA>=0.3",)),
    "robustbench": ("robustbench: models", ("robustbench>=1.1", "pyautoattack>=0.2", "setuptools<81")),
    "av": ("video files", ("av>=12",)),
    "orthogonium": ("orthogonal encoders", ("orthogonium>=0.0.4",)),
}
"""Optional distributions: what they are for, and what it takes."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False) -> None:
    """Print versions, devices, missing optional parts and the lines that add them, plugin failures, data roots, the zoo."""
    found = diagnose()
    if as_json:
        print_json(found)
        return
    for title, values in found.items():
        typer.echo(title.replace("_", " "))
        _echo(values)


def _echo(values: Any) -> None:
    if isinstance(values, dict):
        width = max(map(len, values), default=0)
        for key, value in values.items():
            typer.echo(f"  {key:<{width}}  {value}")
    for line in values if isinstance(values, list) else ():
        typer.echo("  " + (f"{line['name']}: {line['reason']}\n    {line['fix']}" if isinstance(line, dict) else str(line)))
    if not values:
        typer.echo("  none")


def diagnose() -> dict[str, Any]:
    """Return versions, devices, missing optional parts, plugins that cannot be used, data roots and zoo, as plain values."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "missing_optional_parts": _missing(),
        "plugins_that_cannot_be_used": _plugins(),
        "data": _data(),
        "zoo": _zoo(),
    }


def _version(name: str) -> str | None:
    try:
        return version() if name == "rsplugins" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    names = ["rsplugins", *_required(), *_OPTIONAL]
    return found | {name: found_here for name in names if (found_here := _version(name)) is not None}


def _required() -> list[str]:
    try:
        texts = importlib.metadata.requires("rsplugins") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in texts if not re.search(r"\bextra\s*==", text)]
    return [need.name for need in requirements if need.marker is None or need.marker.evaluate()]


def _devices() -> list[str]:
    try:
        import torch
    except Exception as error:
        return [f"torch cannot be imported: {type(error).__name__}: {error}"]
    devices = [f"cpu: {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(f"cuda:{number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps: Apple GPU")
    return devices


def _missing() -> list[dict[str, str]]:
    missing = []
    for name in _required():
        if not _version(name):
            missing.append({"name": name, "reason": "required, but not installed", "fix": f'pip install "{name}"'})
    for name, (purpose, requires) in _OPTIONAL.items():
        needs = unmet(requires)
        if needs:
            missing.append({"name": name, "reason": f"needed for {purpose}; {missing_text(needs)}", "fix": install_line(needs)})
    return missing


def _plugins() -> list[dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entries = get_host().entries()
    except RspluginsError as error:
        return [{"name": "host", "reason": error.what, "fix": error.fix}]
    # One missing distribution can take a dozen entries along: one paragraph for all of them.
    groups: dict[tuple[Status, str, str], list[str]] = {}
    for entry in entries:
        if entry.status is not Status.ACTIVE:
            groups.setdefault((entry.status, entry.reason, entry.fix), []).append(entry.label)
    return [
        {"name": f"{', '.join(labels)}: {status}", "reason": reason, "fix": fix}
        for (status, reason, fix), labels in groups.items()
    ]


def _data() -> dict[str, str]:
    named = os.environ.get("RSPLUGINS_DATA")
    root = Path(named or "data")
    inside = sorted(path.name for path in root.iterdir())[:20] if root.is_dir() else []
    source = "RSPLUGINS_DATA" if named else "default, set RSPLUGINS_DATA or --data-root for another"
    return {
        "root": f"{root} ({source})",
        "holds": ", ".join(inside) if inside else "nothing" if root.is_dir() else "does not exist",
    }


def _zoo() -> dict[str, str]:
    from rsplugins.models.store import DEFAULT_MODEL, folders

    try:
        found = folders()
    except RspluginsError as error:
        return {"problem": error.what}
    return {"default model": f"zoo:{DEFAULT_MODEL}", **{name: str(folder) for name, folder in found.items()}}
