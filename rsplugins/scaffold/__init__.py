"""What ``rsplugins new`` writes: a package that installs, works and passes its contract before anything is changed."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from rsplugins.errors import ParameterError, UnknownNameError, UsageError

KINDS = ("certifier", "training-hook", "model-source", "denoiser", "dataset", "bound-operator", "moment-rule")

EXAMPLES = {"model-source": "linear", "denoiser": "blur"}
"""By kind, what the written plugin has to be checked with."""

_FILES = Path(__file__).parent / "templates"


def write_plugin(name: str, kind: str, directory: Path) -> list[Path]:
    """Write a plugin package.

    Args:
        name: what the plugin brings is called so: lower-case letters, digits, hyphens.
        kind: one of :data:`KINDS`.
        directory: where the folder ``NAME`` is made; the distribution in it is called ``rsplugins-NAME``.

    Returns:
        The files written, relative to ``directory``.

    Raises:
        UnknownNameError: another kind.
        ParameterError: a name that cannot be one.
        UsageError: the folder is there already.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of plugin", kind, KINDS)
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise ParameterError(f"{name!r} cannot be the name of a plugin.", fix="Use lower-case letters, digits and hyphens.")
    root = directory / name
    if root.exists():
        raise UsageError(f"{root} exists already.", fix="Choose another name, or another --directory.")
    values = {"name": name, "package": f"rsplugins_{module}", "class_": "".join(part.title() for part in name.split("-"))}
    values |= {"kind": kind, "reference": f" --reference {EXAMPLES[kind]}" if kind in EXAMPLES else ""}
    written = []
    for folder in ("common", kind):
        for source in sorted((_FILES / folder).rglob("*.txt")):
            place = source.relative_to(_FILES / folder).with_suffix("")
            target = root / Path(str(place).replace("package", values["package"]))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(source.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
            written.append(target.relative_to(directory))
    return written
