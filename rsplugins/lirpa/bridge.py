"""auto-LiRPA's graph of a module as it comes: unchecked, with the options that it gets right."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from rsplugins.compat import bridge_auto_lirpa

Operators = Mapping[str, type]
"""ONNX operator name -> auto-LiRPA Bound class, as ``custom_ops`` takes them; only the operators of the trace are looked up."""


@runtime_checkable
class Hinting(Protocol):
    """Operators that can say why one is not among them."""

    def hint(self, operator: str) -> str:
        """Return a sentence, or nothing."""
        ...


def traced(module: nn.Module, pair: Tensor, operators: Operators | None = None, *, matrices: bool = False) -> Any:
    """Return auto-LiRPA's graph of a module, recorded with two inputs, as it comes; see :func:`bounded`."""
    return bridge_auto_lirpa().BoundedModule(
        module,
        pair,
        bound_opts=_options(module, matrices),
        device=pair.device,
        custom_ops={} if operators is None else operators,
    )


def _options(module: nn.Module, matrices: bool) -> dict[str, Any]:
    # The patches mode of both releases takes a grouped kernel for a full one, and refuses dilation.
    unusual = any(isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.dilation != (1, 1)) for layer in module.modules())
    # Its sparse alphas fail in release 0.3 where nearly all neurons of a layer are unstable: their indices are kept from before.
    return {"sparse_features_alpha": False} | ({"conv_mode": "matrix"} if unusual or matrices else {})


def roots(graph: Any) -> list[Any]:
    """Return the nodes at which a graph begins: its inputs and constants. Release 0.7 has another name for them than 0.3."""
    return [graph[name] for name in (graph.root_names if hasattr(graph, "root_names") else graph.root_name)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep auto-LiRPA's prints, log lines and warnings away: standard output belongs to the command's own result."""
    logger = logging.getLogger("auto_LiRPA.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # For l1 balls it divides by zero on the way to the dual norm inf.
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore"):
            yield
    finally:
        logger.setLevel(level)
