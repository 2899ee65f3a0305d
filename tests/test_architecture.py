"""Imports point downwards only: DESIGN's storeys, read from the source with ast, so that no import order can hide a cycle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rsplugins

ROOT = Path(rsplugins.__file__).parent

STOREYS = [
    ["errors", "provenance", "stopping"],
    ["rounding", "double"],
    ["certificate", "execution", "scaffold"],
    ["statistics", "checks", "doubts", "compat", "arithmetic", "machine", "parameters"],
    # what is seen of any module while it runs; knows no certifier
    ["watch"],
    ["classifier"],
    ["certifier", "chain", "denoising.diffusion", "denoising.network", "denoising.composition"],
    # a model's graph by torch.export, and what is read off it
    ["aten"],
    ["sampling", "lipschitz", "lirpa", "reduction", "attacks", "patches"],
    ["moments"],
    ["certifiers", "models", "data"],
    ["host"],
    ["builtin"],
    # the front doors that ask the host for a plugin by name; the modules behind models and data do not know the host
    ["certification", "denoising", "models.__init__", "data.__init__", "moments.plugins", "lirpa.operators"],
    # these take plugins' moment rules, and plugins' bound operators
    ["certifiers.covariance", "certifiers.covariance_guided", "certifiers.bounds"],
    ["runs", "training"],
    ["api"],
    # from the records of a model to its numbers, its card, and back into the zoo
    ["zoo"],
    ["testing"],
    ["cli"],
]
"""From the ground up. A module belongs to the longest entry that its name starts with; a room may be missing yet."""

FLOOR = {place: storey for storey, places in enumerate(STOREYS) for place in places}
TORCH_FREE = ("errors", "certificate", "certifier", "statistics", "host", "builtin", "cli")
TORCH_FREE += ("patches", "machine.files", "machine.progress", "machine.ranks", "models.store", "models.manifest", "models.files")
TORCH_FREE += (
    "attacks.claims",
    "attacks.masking",
    "zoo.evidence",
    "zoo.cards",
    "zoo.verify",
    "zoo.add",
    "zoo.publish",
    "zoo.fetch",
)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SOURCES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [name for name in SOURCES if name != "__init__"]


def _module(target: str) -> str | None:
    """The module that ``rsplugins.x.y`` is or lies in, named as in SOURCES; None when it is not of this package."""
    package, _, rest = target.partition(".")
    while package == "rsplugins":
        for candidate in (rest, f"{rest}.__init__".removeprefix(".")):
            if candidate in SOURCES:
                return candidate
        rest = rest.rpartition(".")[0]
    return None


def _imports(tree: ast.AST, *, inside_functions: bool = True) -> Iterator[str]:
    """Full names that the code imports; what stands under ``if TYPE_CHECKING`` is for readers and left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(ast.Module(node.orelse, []), inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports(node, inside_functions=inside_functions)


def _used(name: str) -> set[str]:
    """Modules of this package that a module imports, the lazy door ``rsplugins`` itself apart."""
    found = {_module(target) for target in _imports(ast.parse(SOURCES[name].read_text()))}
    return {module for module in found if module not in (None, name, "__init__")}


def _place(name: str) -> str:
    return max((place for place in FLOOR if f"{name}.".startswith(f"{place}.")), key=len, default="cli")


def _room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_storey():
    homeless = sorted({_room(name) for name in MODULES} - {_room(place) for place in FLOOR})
    assert not homeless, f"give these rooms a place in STOREYS: {homeless}"


def test_every_storey_has_a_file():
    empty = sorted(set(FLOOR) - {_place(name) for name in MODULES})
    assert not empty, f"take these places out of STOREYS: {empty}"


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of imports, first and last the same; empty when there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for used in sorted(arrows.get(name, ())):
            if found := walk(used, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_no_circle_among_files():
    """Also inside a room, and whether the import stands at the top of a module or in a function."""
    assert not _circle({name: _used(name) for name in MODULES})


def test_a_circle_is_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    floor = FLOOR[_place(name)]
    upward = [used for used in _used(name) if _place(used) != _place(name) and FLOOR[_place(used)] >= floor]
    assert not upward, f"rsplugins.{name} (storey {floor}) imports what does not lie below it: {upward}"


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) == "certifiers"])
def test_no_certifier_imports_another(name):
    assert not [used for used in _used(name) if _room(used) == "certifiers"]


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) == "host"])
def test_the_host_knows_only_descriptions(name):
    assert {_room(used) for used in _used(name)} <= {"host", "certificate", "errors", "provenance"}


WITHOUT_TORCH = [name for name in MODULES if f"{name}.".startswith(tuple(f"{place}." for place in TORCH_FREE))]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_at_module_level(name):
    names = _imports(ast.parse(SOURCES[name].read_text()), inside_functions=False)
    assert not {target for target in names if target.partition(".")[0] in ("torch", "torchvision", "timm")}


def test_torch_free_rooms_load_without_torch():
    loads = [f"rsplugins.{name.removesuffix('.__init__')}" for name in WITHOUT_TORCH if _room(name) != "cli"]
    assert {"rsplugins.statistics", "rsplugins.host", "rsplugins.certificate", "rsplugins.zoo.verify"} <= set(loads)
    code = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code, *loads], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reader_of_imports_sees_what_it_should():
    source = """
import torch.nn
from rsplugins.host import Host
from rsplugins.host.manager import Host as H
if TYPE_CHECKING:
    import hidden
else:
    import shown
def late():
    from rsplugins import errors
class Body:
    import early
"""
    tree = ast.parse(source)
    everything = {"torch.nn", "rsplugins.host.Host", "rsplugins.host.manager.Host", "shown", "rsplugins.errors", "early"}
    assert set(_imports(tree)) == everything
    assert set(_imports(tree, inside_functions=False)) == everything - {"rsplugins.errors"}
    targets = [
        "rsplugins.host.Host",
        "rsplugins.host.manager.Host",
        "rsplugins.errors",
        "rsplugins.wrap",
        "rsplugins",
        "torch.nn",
    ]
    assert [_module(target) for target in targets] == ["host.__init__", "host.manager", "errors", "__init__", "__init__", None]
    assert [_place(name) for name in ("models.__init__", "models.timm", "zoo.store", "runs.verify")] == [
        "models.__init__",
        "models",
        "zoo",
        "runs",
    ]
