"""Which calls have a rule, and the names of all arguments that the rule covers.

The tables are closed: a call that is not here has no bound, an argument that is not named here is refused
(:func:`~rsplugins.lipschitz.arguments.bind`), and so is one that the rule does not read
(:meth:`~rsplugins.lipschitz.arguments.Call.finish`). Functions are known by identity, so that another of the same name is not.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rsplugins.lipschitz import activations, joins, rules, selection

ANY = "..."
"""Stands for all arguments: the rule carries the call out as it is, or whatever they say changes nothing."""


@dataclass(frozen=True)
class Entry:
    """A rule and the arguments that it covers.

    Attributes:
        rule: of the call.
        parameters: of a function or method, as :func:`~rsplugins.lipschitz.arguments.bind` takes them, or ``ANY``; of a layer
            the attributes that its forward reads besides the parameters of its constructor.
        options: what tells apart calls that share the rule.
    """

    rule: rules.Rule
    parameters: str
    options: dict[str, Any] = field(default_factory=dict)


_POINTWISE = ("relu", "tanh", "sigmoid", "abs", "neg", "sin", "cos")
_MOVES = (
    "flatten", "unflatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind", "roll", "flip",
    "narrow", "swapaxes", "movedim", "select", "t", "tensor_split",
)  # fmt: skip
_CONVOLUTION = "input weight bias stride padding dilation groups"
_MAX_POOL = "input kernel_size stride padding dilation ceil_mode return_indices"
_AVG_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
_REDUCTION = "input dim keepdim * dtype"

_ADD = Entry(joins.add, "input other * alpha", {"scaled": "other"})
_RSUB = Entry(joins.add, "input other * alpha", {"scaled": "input"})
_MULTIPLY = Entry(joins.multiply, "input other")
_DIVIDE = Entry(joins.divide, "input other * rounding_mode")
_CLAMP = Entry(joins.clamp, "input min max")
_STACK = Entry(joins.stack, "tensors dim")
_MOVE = Entry(selection.move, ANY)
_KEEP = Entry(selection.keep, "input * memory_format")


def _pointwise(name: str, settings: str = "") -> Entry:
    return Entry(rules.activation, f"input {settings}", {"name": name})


_NAMED: dict[str, Entry] = {
    **dict.fromkeys(("add", "sub", "subtract"), _ADD),
    **dict.fromkeys(("mul", "multiply"), _MULTIPLY),
    **dict.fromkeys(("div", "divide", "true_divide"), _DIVIDE),
    **{name: Entry(rules.reduction, _REDUCTION, {"name": name}) for name in ("mean", "sum")},
    **{name: Entry(rules.reduction, "input dim keepdim", {"name": "max"}) for name in ("amax", "amin")},
    **{name: _pointwise(name) for name in _POINTWISE},
    **dict.fromkeys(("clamp", "clip"), _CLAMP),
    **dict.fromkeys(_MOVES, _MOVE),
    **dict.fromkeys(("clone", "detach"), _KEEP),
}
"""Functions of torch that are methods of the same name, with the same arguments, as well."""

METHODS: dict[str, Entry] = {
    **_NAMED,
    **{f"{name}_": _NAMED[name] for name in ("add", "sub", "mul", "div", "clamp", "clip", *_POINTWISE)},
    **dict.fromkeys(("view", "expand"), _MOVE),
    **dict.fromkeys(("contiguous", "float", "double"), _KEEP),
    "to": Entry(rules.conversion, "input dtype"),
}
"""By the name of the method."""

_SLOPE_SETTINGS = {
    "leaky_relu": "negative_slope inplace",
    "elu": "alpha inplace",
    "celu": "alpha inplace",
    "hardtanh": "min_val max_val inplace",
    "softplus": "beta threshold",
    "softshrink": "lambd",
    "gelu": "* approximate",
}

FUNCTIONS: dict[Any, Entry] = {
    **{function: _pointwise(name, _SLOPE_SETTINGS.get(name, "inplace")) for function, name in activations.FUNCTIONS.items()},
    **{getattr(torch, name): entry for name, entry in _NAMED.items()},
    **{getattr(torch, f"{name}_"): _NAMED[name] for name in ("clamp", "clip", *_POINTWISE)},
    **{getattr(torch, name): _STACK for name in ("cat", "concat", "concatenate", "stack")},
    **{getattr(torch, name): Entry(joins.stack, "tensors") for name in ("hstack", "vstack")},
    torch.rsub: _RSUB,
    torch.softmax: Entry(rules.softmax, "input dim dtype"),
    F.softmax: Entry(rules.softmax, "input dim _stacklevel dtype"),
    F.hardtanh_: _pointwise("hardtanh", "min_val max_val"),
    F.linear: Entry(rules.linear, "input weight bias"),
    F.batch_norm: Entry(rules.batch_norm, "input running_mean running_var weight bias training momentum eps"),
    F.layer_norm: Entry(rules.normalisation, "input normalized_shape weight bias eps"),
    F.group_norm: Entry(rules.normalisation, "input num_groups weight bias eps"),
    F.interpolate: Entry(rules.interpolate, "input size scale_factor mode align_corners recompute_scale_factor antialias"),
    **dict.fromkeys((F.pad, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle), _MOVE),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), Entry(rules.convolution, _CONVOLUTION)),
    **{f: Entry(rules.max_pool, _MAX_POOL, {"dims": d}) for d, f in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d), 1)},
    **{f: Entry(rules.avg_pool, _AVG_POOL, {"dims": d}) for d, f in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), 1)},
    **{
        f: Entry(rules.adaptive_avg_pool, "input output_size", {"dims": d})
        for d, f in enumerate((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), 1)
    },
    **{
        f: Entry(rules.adaptive_max_pool, "input output_size return_indices", {"dims": d})
        for d, f in enumerate((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), 1)
    },
    **{
        f: Entry(rules.dropout, "input p training inplace", {"layer": False})
        for f in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
    },
    **dict.fromkeys((operator.add, operator.sub, operator.iadd, operator.isub), _ADD),
    **dict.fromkeys((operator.mul, operator.imul), _MULTIPLY),
    **dict.fromkeys((operator.truediv, operator.itruediv), _DIVIDE),
    operator.abs: _pointwise("abs"),
    operator.neg: _pointwise("neg"),
    operator.getitem: Entry(selection.getitem, "input index"),
}
"""By the function itself."""

MODULES: dict[type[nn.Module], Entry] = {
    nn.Linear: Entry(rules.linear, "weight"),
    nn.Identity: Entry(rules.identity, ""),
    nn.Softmax: Entry(rules.softmax, ""),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm), Entry(rules.normalisation, "weight bias")),
    nn.Upsample: Entry(rules.interpolate, ""),
    **{kind: Entry(rules.activation, "", {"name": name}) for kind, name in activations.MODULES.items()},
    **{
        kind: Entry(rules.dropout, "", {"layer": True})
        for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    },
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelUnshuffle, nn.PixelShuffle, nn.ChannelShuffle), _MOVE),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _MOVE),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), Entry(rules.transposed_convolution, "weight")),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Entry(rules.convolution, "weight _reversed_padding_repeated_twice")),
    **{kind: Entry(rules.max_pool, "", {"dims": d}) for d, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)},
    **{kind: Entry(rules.avg_pool, "", {"dims": d}) for d, kind in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)},
    **{
        kind: Entry(rules.adaptive_avg_pool, "", {"dims": d})
        for d, kind in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)
    },
    **{
        kind: Entry(rules.adaptive_max_pool, "", {"dims": d})
        for d, kind in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)
    },
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), Entry(rules.batch_norm, "running_mean running_var weight bias")
    ),
}
"""By the class whose forward runs."""
