"""Lipschitz constants of functions applied entry by entry: the largest slope, rounded up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional as F

from rsplugins.lipschitz.norms import up

GELU = 1.128905
r"""Slope of GELU, :math:`\Phi(x) + x \phi(x)`: its derivative is :math:`(2 - x^2) \phi(x)`, so it is largest at
:math:`x = \sqrt 2`: 1.1289041..."""

GELU_TANH = 1.129
"""Slope of the tanh form of GELU; 1.1289930... near x = 1.4185 (largest slope on a fine grid, rounded up by far more than
the square of the grid's step)."""

SILU = 1.09984
r"""Slope of SiLU, :math:`\sigma(x)(1 + x(1 - \sigma(x)))`, largest where
:math:`x \tanh(x / 2) = 2`, at x = 2.39936: 1.0998394..."""

MISH = 1.0885
"""Slope of Mish, 1.0884981... near x = 1.4906 (found as for the tanh form of GELU)."""

SELU = up(1.0507009873554805 * 1.6732632423543772)
"""Slope of SELU just below zero: scale times alpha; above zero it is the scale, which is smaller."""

SOFTPLUS_JUMP = 2.0**-24
"""The largest jump that Softplus may have where it goes over to x."""


def _constant(value: float) -> Callable[..., float]:
    return lambda **_: value


def _leaky(negative_slope: float = 0.01, **_: Any) -> float:
    return max(1.0, abs(negative_slope))


def _elu(alpha: float = 1.0, **_: Any) -> float:
    return max(1.0, abs(alpha))


def _gelu(approximate: str = "none", **_: Any) -> float:
    return GELU if approximate == "none" else GELU_TANH


def _celu(alpha: float = 1.0, **_: Any) -> float | None:
    # alpha (exp(x / alpha) - 1) has slope exp(x / alpha), which grows without end to the left where alpha is negative.
    return 1.0 if alpha > 0 else None


def _softplus(beta: float = 1.0, threshold: float = 20.0, **_: Any) -> float | None:
    # Where beta x passes the threshold PyTorch goes over to x itself, down by a jump of log(1 + exp(-threshold)) / beta. The
    # slope is below 1 on both sides, so two values lie no further apart than their arguments, or than the jump: it is let
    # through below the float32 rounding of x and of numbers near 1. Around 0 values are log(2) / beta, which rounds coarsely
    # where beta is tiny.
    small = beta >= 0.01 and threshold >= 17.0 and math.log1p(math.exp(-threshold)) <= SOFTPLUS_JUMP * beta
    return 1.0 if small else None


SLOPES: dict[str, Callable[..., float | None]] = {
    "relu": _constant(1.0),
    "relu6": _constant(1.0),
    "hardtanh": _constant(1.0),
    "leaky_relu": _leaky,
    "elu": _elu,
    "celu": _celu,
    "selu": _constant(SELU),
    "gelu": _gelu,
    "silu": _constant(SILU),
    "mish": _constant(MISH),
    "hardswish": _constant(1.5),
    "hardsigmoid": _constant(up(1.0 / 6.0)),
    "sigmoid": _constant(0.25),
    "logsigmoid": _constant(1.0),
    "tanh": _constant(1.0),
    "tanhshrink": _constant(1.0),
    "softsign": _constant(1.0),
    "softshrink": _constant(1.0),
    "softplus": _softplus,
    "abs": _constant(1.0),
    "neg": _constant(1.0),
    "clamp": _constant(1.0),
    "sin": _constant(1.0),
    "cos": _constant(1.0),
}
"""By name: the slope, given the function's own settings; None when these settings have no bound."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "celu": ("alpha",),
    "hardtanh": ("min_val", "max_val"),
    "softplus": ("beta", "threshold"),
    "softshrink": ("lambd",),
    "gelu": ("approximate",),
}
"""The settings that follow the input, ``inplace`` apart."""

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.SELU: "selu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.LogSigmoid: "logsigmoid",
    nn.Tanh: "tanh",
    nn.Tanhshrink: "tanhshrink",
    nn.Softsign: "softsign",
    nn.Softshrink: "softshrink",
    nn.Softplus: "softplus",
}

FUNCTIONS: dict[Any, str] = {getattr(F, name): name for name in SLOPES if hasattr(F, name)}
