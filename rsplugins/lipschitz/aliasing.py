"""Operations that write in place: harmless unless what they overwrite is used again."""

from __future__ import annotations

from torch import fx, nn

from rsplugins.lipschitz.tracing import Traced

_IN_PLACE_FUNCTIONS = ("iadd", "isub", "imul", "itruediv")
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "contiguous", "squeeze",
    "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "expand", "getitem", "detach", "float", "double",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "pad",
}  # fmt: skip
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def overwritten_too_early(traced: Traced) -> dict[fx.Node, str]:
    """Return the in-place operations that change a value which something else reads later, with that reader's name.

    The rules take a node's value for what it was when it was computed; after such an operation that is no longer true.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    found: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        target = _target(traced, node)
        if target is None or not traced.info[node].varying:
            continue
        readers = [reader for alias in _aliases(traced, target, node) for reader in alias.users if order[reader] > order[node]]
        if readers:
            found[node] = traced.path(readers[0])
    return found


def _target(traced: Traced, node: fx.Node) -> fx.Node | None:
    """Return the node that this one overwrites, or None."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        writes = bool(getattr(traced.root.get_submodule(name), "inplace", False))
    else:
        writes = node.kwargs.get("inplace") is True or "out" in node.kwargs or name in _IN_PLACE_FUNCTIONS
        writes = writes or (name.endswith("_") and not name.endswith("__"))
    return first if writes else None


def _aliases(traced: Traced, target: fx.Node, writer: fx.Node) -> set[fx.Node]:
    """Return the nodes that may share memory with ``target``, but for what the writer itself returns."""

    def shares(node: fx.Node) -> bool:
        if node.op == "call_module":
            module = traced.root.get_submodule(str(node.target))
            return isinstance(module, _VIEW_MODULES) or _target(traced, node) is not None
        name = str(getattr(node.target, "__name__", node.target))
        return node.op != "placeholder" and (name in _VIEWS or _target(traced, node) is not None)

    root = target
    while shares(root) and root.all_input_nodes:
        root = root.all_input_nodes[0]
    aliases, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            if user is not writer and user not in aliases and shares(user):
                aliases.add(user)
                stack.append(user)
    return aliases
