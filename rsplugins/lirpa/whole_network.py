r"""Expected tight bounds over a whole network at once, as the released code of the method has them.

Interval bounds give every ReLU's mask; one masked Jacobian J from input to outputs gives the half-widths :math:`|J|\,d`. Not a
sound bound: an ESTIMATE. Intervals that blow up with depth set nearly all masks to 1, and then even f(x) can lie outside the
bounds around the masked centre.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rsplugins.arithmetic import full_precision
from rsplugins.certificate import Norm
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.errors import ParameterError
from rsplugins.lirpa.network import BoundNetwork

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import BoundInput, BoundRelu  # noqa: E402

_PIECEWISE = frozenset(
    "Input Relu Linear MatMul Conv BatchNormalization AveragePool GlobalAveragePool Flatten Reshape Add Sub Mul Div Neg Pad "  # noqa: SIM905
    "Transpose Concat Slice Squeeze Unsqueeze Shape Gather Identity Cast ReduceMean ReduceSum".split()
)
"""Operators that are affine in what is perturbed, and ReLU."""


@full_precision()
def whole_network_bounds(
    network: BoundNetwork,
    images: Tensor,
    eps: float | Tensor,
    *,
    clip: bool = False,
    specification: Tensor | None = None,
    center: Literal["masked", "clean"] = "masked",
) -> tuple[Tensor, Tensor]:
    """Return ETB's whole-network bounds over the linf ball. ESTIMATE.

    Args:
        network: without custom operators.
        images: (B, ...), raw pixels.
        eps: linf radius on raw pixels, >= 0; a number or (B,).
        clip: intersect the ball with the [0, 1] box.
        specification: (B, S, K); bounds are then of specification @ logits.
        center: ``"masked"``, the masked network at the box's centre, as the method defines its bounds; or ``"clean"``, f(x),
            which the released training loss puts in its place.

    Returns:
        lower and upper, (B, S or K).

    Raises:
        ParameterError: an activation other than ReLU, for which there is no mask.
    """
    network.bounds(images, eps, norm=Norm.LINF, method="ibp", clip=clip)
    graph = network.graph
    _only_relu(graph)
    root = next(node for node in graph._modules.values() if isinstance(node, BoundInput) and node.perturbed)
    low, high = root.interval
    x = ((low + high) / 2).detach().requires_grad_(True)
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = _masked(graph, graph.final_node(), {root.name: x})
        if specification is not None:
            outputs = torch.einsum("bsk,bk->bs", specification.to(outputs), outputs)
        offsets = [_offset(outputs, row, x, (high - low) / 2, training) for row in range(outputs.shape[1])]
    offset, outputs = torch.stack(offsets, 1), outputs if training else outputs.detach()
    if center == "clean":
        outputs = network.logits(images)
        if specification is not None:
            outputs = torch.einsum("bsk,bk->bs", specification.to(outputs), outputs)
    return outputs - offset, outputs + offset


def _offset(outputs: Tensor, row: int, x: Tensor, half_widths: Tensor, training: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(outputs[:, row].sum(), x, retain_graph=True, create_graph=training)
    return (gradient.abs() * half_widths).flatten(1).sum(1)


def _masked(graph: Any, node: Any, values: dict[str, Tensor]) -> Tensor:
    """Run the graph with each ReLU replaced by its mask."""
    if node.name not in values:
        inputs = [_masked(graph, parent, values) for parent in node.inputs]
        if isinstance(node, BoundRelu):
            mask = (node.inputs[0].interval[1] >= 0).to(inputs[0].dtype)
            values[node.name] = inputs[0] * mask
        else:
            value = node.forward(*inputs)
            # auto-LiRPA's shape operators expect tensors and give sizes.
            values[node.name] = torch.tensor(value) if isinstance(value, (torch.Size, tuple)) else value
    return values[node.name]


def _only_relu(graph: Any) -> None:
    for node in graph._modules.values():
        kind = type(node).__name__.removeprefix("Bound")
        products = kind in ("Mul", "Div", "MatMul") and sum(parent.perturbed for parent in node.inputs) > 1
        if node.perturbed and (kind not in _PIECEWISE or products):
            raise ParameterError(
                f"Expected tight bounds of a whole network have no mask for {kind}.",
                cause="the method is defined for ReLU networks.",
                fix="Use a ReLU network, or the block operators, which bound other activations by intervals.",
            )
