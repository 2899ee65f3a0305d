"""Lipschitz bounds that hold in a ball around one image: rectifiers that stay off there count for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rsplugins.arithmetic import full_precision
from rsplugins.lipschitz.analysis import Analysis
from rsplugins.lipschitz.composition import Dense, Evaluation, Value
from rsplugins.lipschitz.convolution import Convolution
from rsplugins.lipschitz.norms import matrix_norm, times
from rsplugins.lipschitz.tracing import ancestors

_ROUNDING = 1e-5
"""How much of the largest pre-activation float32 may have got wrong."""


@full_precision()
def run_recording(analysis: Analysis, node: fx.Node, image: Tensor) -> tuple[Tensor, dict[fx.Node, Tensor]]:
    """Run the network up to a node, once.

    Args:
        analysis: of the whole Classifier.
        node: the latent.
        image: (1, C, H, W).

    Returns:
        The latent (1, ...), and what each node on the way returned.
    """
    needed = ancestors(node)
    seen: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n not in needed:
                return None
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n] = result.clone()  # a later operation may write in place
            return result

    Recorder(analysis.traced.root, garbage_collect_values=False, graph=analysis.traced.graph).run(image)
    return seen[node], seen


@full_precision()
def local_constants(analysis: Analysis, node: fx.Node, seen: dict[fx.Node, Tensor], gammas: Sequence[float]) -> list[float]:
    r"""Return upper bounds of the Lipschitz constant from the image to a node on balls around one image.

    By induction over the graph: let :math:`c` bound the constant of a layer's input on the ball of radius :math:`\gamma`. A
    pre-activation with weights w moves by at most :math:`\|w\| c \gamma` there. Where it stays negative the rectifier's output is
    0 on the whole ball, so for any two images of the ball only the other rows of the layer act: the bound after the rectifier is
    c times the norm of these rows, and the next layer's columns that belong to the silent outputs multiply a difference of 0. All
    else follows the global rules, which hold on every set.

    Args:
        analysis: of the whole Classifier.
        node: the latent.
        seen: of the image, as :func:`run_recording` returns it.
        gammas: radii of the balls, on raw pixels.
    """
    before: dict[Value, Tensor] = {}
    for candidate, value in analysis.values.items():
        source = candidate.all_input_nodes[0] if candidate.all_input_nodes else None
        if value.rectifier and source is not None and source in seen and value not in before:
            before[value] = seen[source]
    latent = analysis.values[node]
    return [min(_Local(gamma, before).constant(latent), analysis.constant(node)) for gamma in gammas]


@dataclass
class _Local(Evaluation):
    """Constants on one ball."""

    gamma: float = 0.0
    before: dict[Value, Tensor] = field(default_factory=dict)
    awake: dict[Value, Tensor] = field(default_factory=dict)

    def __init__(self, gamma: float, before: dict[Value, Tensor]) -> None:
        super().__init__()
        self.gamma, self.before, self.awake = gamma, before, {}

    def _compute(self, value: Value) -> float:
        inner = value.inputs[0] if value.inputs else None
        if value.rectifier and inner is not None and value in self.before and isinstance(inner.operator, (Dense, Convolution)):
            return self._rectified(value, inner)
        if value.operator is not None and inner is not None and inner in self.awake:
            narrowed = _columns(value.operator, self.awake[inner])
            if narrowed is not None:
                return times(narrowed, self.constant(inner))
        return super()._compute(value)

    def _rectified(self, value: Value, inner: Value) -> float:
        plain = self.constant(inner)
        if not isinstance(inner.operator, (Dense, Convolution)):
            return plain
        activation = self.before[value][0].detach().cpu().double()
        reach = _row_norms(inner.operator, activation.dim()) * self.constant(inner.inputs[0]) * self.gamma * (1.0 + 1e-9)
        awake = activation + reach > -_ROUNDING * activation.abs().max()
        if bool(awake.all()):
            return plain
        self.awake[value] = awake
        return min(plain, times(_rows(inner.operator, awake), self.constant(inner.inputs[0])))


def _row_norms(operator: Dense | Convolution, dims: int) -> Tensor:
    if isinstance(operator, Dense):
        return operator.matrix.square().sum(1).sqrt()
    # Taps that wrap onto the same pixel add up, which the l1 norm covers.
    taps = operator.weight.flatten(1)
    norms = taps.abs().sum(1) if operator.circular else taps.square().sum(1).sqrt()
    return norms.reshape(-1, *[1] * (dims - 1))


def _rows(operator: Dense | Convolution, awake: Tensor) -> float:
    if isinstance(operator, Dense):
        return matrix_norm(operator.matrix[awake]) if awake.dim() == 1 else operator.norm()
    if operator.is_small():
        return matrix_norm(operator.matrix()[awake.flatten()])
    return operator.scaled_out(awake.flatten(1).any(1).to(torch.float64)).norm()


def _columns(operator: Any, awake: Tensor) -> float | None:
    if isinstance(operator, Dense):
        return matrix_norm(operator.matrix[:, awake]) if awake.dim() == 1 else None
    if isinstance(operator, Convolution) and awake.dim() > 1:
        if operator.is_small():
            return matrix_norm(operator.matrix()[:, awake.flatten()])
        return operator.scaled_in(awake.flatten(1).any(1).to(torch.float64)).norm()
    return None
