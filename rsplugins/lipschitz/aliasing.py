"""Operations that write in place: harmless unless what they overwrite is used again."""

from __future__ import annotations

from torch import fx

from rsplugins.lipschitz.tracing import Traced, reads_shape


def overwritten_too_early(traced: Traced) -> dict[fx.Node, str]:
    """Return the in-place operations that change a value which something else reads later, with that reader's name.

    The rules take a node's value for what it was when it was computed; after such an operation that is no longer true. Which
    nodes share memory, and which write, is what they did when the graph ran.
    """
    found: dict[fx.Node, str] = {}
    nodes = list(traced.graph.nodes)
    for place, node in enumerate(nodes):
        info = traced.info.get(node)
        if info is None or not info.written or not info.varying:
            continue
        stale = {other for other in nodes[:place] if traced.info[other].memory & info.written}
        readers = [
            reader for reader in nodes[place + 1 :] if stale.intersection(reader.all_input_nodes) and not reads_shape(reader)
        ]
        if readers:
            found[node] = traced.path(readers[0])
    return found
