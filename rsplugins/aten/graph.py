"""A model's graph of aten operators, by torch.export: shapes are constants, and nothing is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rsplugins.double import bring
from rsplugins.errors import ParameterError

_SILENT = frozenset({"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"})
"""Operators that check and return nothing."""


def exported(model: nn.Module, example: Tensor) -> fx.GraphModule | None:
    """Return the graph of a model for one shape of input; None where torch.export cannot trace it.

    Args:
        model: in the dtype of ``example``.
        example: (1, ...).
    """
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            program = torch.export.export(model, (example,), strict=False)
            graph: fx.GraphModule = program.run_decompositions({}).module()
    except Exception:  # whatever torch says of forward(); the caller has another way, or words of its own
        return None
    if any(node.op in ("call_module", "call_method") and "guards" not in str(node.target) for node in graph.graph.nodes):
        return None
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_module" or (node.op == "call_function" and name_of(node) in _SILENT):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def check_graph(graph: fx.GraphModule | None, model: nn.Module, example: Tensor, nothing: str) -> None:
    """Hold a graph against the model at a drawn input; without a graph, only run the model there.

    Args:
        graph: of the model.
        model: as it was exported.
        example: (1, ...), for shape, dtype and device.
        nothing: what the message ends with, such as ``"Nothing was certified."``

    Raises:
        ParameterError: they differ.
    """
    generator = torch.Generator().manual_seed(2)
    other = bring(torch.rand(example.shape, generator=generator, dtype=torch.float64), example.device, example.dtype)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            expected = model(other)
        except RuntimeError as error:
            raise ParameterError(
                f"The model does not run in {str(example.dtype).removeprefix('torch.')}. {nothing}",
                cause=f"forward() fixes a format: {str(error).splitlines()[0]}",
                fix="Leave .float(), .half() and dtype= out of it, or use a certifier that runs the model itself.",
            ) from error
        found = expected if graph is None else graph(other)
        found = found[0] if isinstance(found, (tuple, list)) else found
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-6, atol=1e-8):
        raise ParameterError(
            f"The exported graph of the model computes something else than the model. {nothing}",
            cause="values of pixels become a constant of the graph.",
            fix="Write forward() with tensor operations, or use a certifier that runs the model itself, such as 'gaussian'.",
        )


def name_of(node: fx.Node) -> str:
    """Return the operator's name without its overload, such as ``"conv2d"``."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def attribute(graph: fx.GraphModule, path: str) -> Any:
    """Return what a ``get_attr`` node stands for."""
    found: Any = graph
    for part in path.split("."):
        found = getattr(found, part)
    return found


def last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, whose values nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found
