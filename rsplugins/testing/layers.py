"""Layers by the operator that they are traced to: what bound operators and moment rules are checked with."""

from __future__ import annotations

import importlib
import operator as attributes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsplugins.errors import ParameterError
from rsplugins.testing.outcome import BrokenContractError


class Layer(NamedTuple):
    """A layer to check an operator with.

    Attributes:
        make: makes it.
        shape: of one input.
        low: where its inputs start; a logarithm has none below 0.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    low: float = -3.0


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _of(function: Callable[[Tensor], Tensor], low: float = -3.0) -> Layer:
    return Layer(lambda: _Function(function), low=low)


_IMAGE = (2, 4, 4)
LAYERS: dict[str, Layer] = {
    "Abs": _of(torch.abs),
    "Atan": _of(torch.atan),
    "AveragePool": Layer(lambda: nn.AvgPool2d(2), _IMAGE),
    "BatchNormalization": Layer(lambda: nn.BatchNorm2d(2).eval(), _IMAGE),
    "Celu": Layer(nn.CELU),
    "Clip": Layer(lambda: nn.Hardtanh(-0.5, 0.8)),
    "Conv": Layer(lambda: nn.Conv2d(2, 2, 3, padding=1), _IMAGE),
    "Cos": _of(torch.cos),
    "Elu": Layer(nn.ELU),
    "Erf": _of(torch.erf),
    "Exp": _of(torch.exp),
    "Flatten": Layer(nn.Flatten, _IMAGE),
    "Gelu": Layer(nn.GELU),
    "Gemm": Layer(lambda: nn.Linear(4, 3)),
    "HardSigmoid": Layer(nn.Hardsigmoid),
    "HardSwish": Layer(nn.Hardswish),
    "LeakyRelu": Layer(lambda: nn.LeakyReLU(0.1)),
    "Log": _of(torch.log, low=0.2),
    "MatMul": Layer(lambda: nn.Linear(4, 3, bias=False)),
    "MaxPool": Layer(lambda: nn.MaxPool2d(2), _IMAGE),
    "Neg": _of(torch.neg),
    "Reciprocal": _of(torch.reciprocal, low=0.2),
    "Relu": Layer(nn.ReLU),
    "Selu": Layer(nn.SELU),
    "Sigmoid": Layer(nn.Sigmoid),
    "Sin": _of(torch.sin),
    "Softmax": Layer(lambda: nn.Softmax(1)),
    "Softplus": Layer(nn.Softplus),
    "Softsign": Layer(nn.Softsign),
    "Sqrt": _of(torch.sqrt, low=0.2),
    "Tan": _of(lambda x: torch.tan(x / 4)),
    "Tanh": Layer(nn.Tanh),
}
"""By the operator's name without ``onnx::`` or ``Bound``."""


def layer_for(name: str, reference: str = "") -> Layer:
    """Return a layer with an operator.

    Args:
        name: ``"onnx::Elu"`` or ``"BoundElu"``.
        reference: ``"module:attribute"``, a class or function that makes the layer; its inputs are of shape ``(4,)``, or of
            what an attribute ``shape`` of the layer says.

    Raises:
        ParameterError: none is known and none was given, or it cannot be imported.
    """
    bare = name.removeprefix("onnx::").removeprefix("Bound")
    bare = {"Linear": "Gemm"}.get(bare, bare)
    if not reference:
        if bare in LAYERS:
            return LAYERS[bare]
        raise ParameterError(
            f"No layer with the operator {name} is known, so it cannot be checked.",
            fix="Name one by --reference module:attribute, a class or function that makes an nn.Module with it.",
        )
    module, _, attribute = reference.partition(":")
    try:
        make = attributes.attrgetter(attribute)(importlib.import_module(module))
        made = make()
    except Exception as error:
        raise ParameterError(f"The layer {reference!r} cannot be made: {type(error).__name__}: {error}") from error
    return Layer(make, tuple(getattr(made, "shape", (4,))))


def made(layer: Layer, seed: int = 0) -> nn.Module:
    """Return the layer in float64 and eval mode, its weights drawn anew."""
    module = layer.make().double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
    if not isinstance(module, nn.Module):
        raise BrokenContractError(f"{layer.make!r} makes no nn.Module")
    return module
