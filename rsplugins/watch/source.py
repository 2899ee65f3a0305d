"""The source of a model's functions: whether a name is read anywhere, and where it is set."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator

from rsplugins.watch import lines

_COLLECTS = ("append", "add", "extend", "update", "appendleft")
_INDIRECT = ("vars", "__dict__", "eval", "exec", "locals", "globals", "attrgetter", "__getattribute__")


class Code:
    """The functions of a model, parsed.

    Args:
        functions: those that belong to it; ``__init__`` does not run when it is called and is left out.
    """

    def __init__(self, functions: Iterable[types.FunctionType]) -> None:
        self._parsed: list[tuple[str, int, ast.AST]] = []
        self._complete = True
        for function in functions:
            if function.__name__ == "__init__":
                continue
            try:
                source, first = inspect.getsourcelines(function)
                tree = ast.parse(textwrap.dedent("".join(source)))
            except (OSError, TypeError, SyntaxError):
                self._complete = False
                continue
            self._parsed.append((function.__code__.co_filename, first, tree))

    def reads(self, name: str) -> bool:
        """Return whether a function may use what a name holds, rather than only count or collect in it."""
        if not self._complete or not self._parsed or name.startswith("__"):
            return True
        for _, _, tree in self._parsed:
            harmless = {id(node) for node in _updates(tree, name)}
            for node in ast.walk(tree):
                if _mentions(node, name) and id(node) not in harmless:
                    return True
        return False

    def line_with(self, names: Iterable[str]) -> str | None:
        """Return ``file:line: text`` of the first use of any of some names, such as ``now`` or ``datetime.now``; None without."""
        for file, first, tree in self._parsed:
            for node in ast.walk(tree):
                if isinstance(node, (ast.Attribute, ast.Name)) and any(_is(node, name) for name in names):
                    return lines.shown(file, first + node.lineno - 1)
        return None

    def line_that_sets(self, name: str) -> str:
        """Return ``file:line: text`` of the first statement that changes what a name holds; nothing when none is found."""
        for file, first, tree in self._parsed:
            for node in ast.walk(tree):
                if isinstance(node, (ast.stmt, ast.Call)) and any(_is(part, name) for part in _changed(node)):
                    return lines.shown(file, first + node.lineno - 1)
        return ""


def _is(node: ast.AST, name: str) -> bool:
    owner, dot, name = name.rpartition(".")
    if dot and not (isinstance(node, ast.Attribute) and _is(node.value, owner)):
        return False
    return (isinstance(node, ast.Attribute) and node.attr == name) or (isinstance(node, ast.Name) and node.id == name)


def _mentions(node: ast.AST, name: str) -> bool:
    if isinstance(node, (ast.Attribute, ast.Name)) and not isinstance(node.ctx, ast.Store):
        return _is(node, name) or any(_is(node, word) for word in _INDIRECT)
    return isinstance(node, ast.Constant) and node.value == name


def _updates(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    """Yield the uses of a name that read it only to count or collect in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and _is(node.target, name):
            yield node.target
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _COLLECTS:
            yield call.func.value


def _changed(node: ast.stmt | ast.Call) -> Iterator[ast.AST]:
    """Yield the parts of what a statement or a call of ``next`` changes."""
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        targets = [node.value.func]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
        targets = list(node.args)
    for target in targets:
        yield from ast.walk(target)
