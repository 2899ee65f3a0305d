"""What the calls that have a Lipschitz rule are called with: an input and what they need, and values of each argument."""

from dataclasses import dataclass

import torch
from torch import nn


def constant(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * 2


@dataclass(frozen=True)
class Moving:
    """Stands for a tensor that is computed from the input of the call."""

    function: object = lambda y: y

    def __repr__(self):
        return "moving"


INPUT = Moving()
TWICE = Moving(lambda y: y * 2)
COLUMN = Moving(lambda y: y.flatten()[:1] * 3)

# ---------------------------------------------------------------------------------------------------------------------------
# what to call: shape of the input (batch first) and the arguments that a call cannot do without; several where modes differ

PLAIN = (1, 2, 1, 4)
_IMAGES = {1: (1, 2, 6), 2: (1, 2, 4, 4), 3: (1, 2, 3, 3, 3)}
_KERNELS = {1: (2, 2, 3), 2: (2, 2, 3, 3), 3: (2, 2, 2, 2, 2)}

BASES = {
    **{f"conv{d}d": [
        (_IMAGES[d], {"weight": constant(*_KERNELS[d])}), (_IMAGES[d], {"weight": constant(2, 1, *[2] * d), "groups": 2})
    ] for d in (1, 2, 3)},
    **{f"{kind}_pool{d}d": [(_IMAGES[d], {"kernel_size": 2})] for kind in ("max", "avg") for d in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{d}d": [(_IMAGES[d], {"output_size": 2})] for kind in ("max", "avg") for d in (1, 2, 3)},
    "interpolate": [
        ((1, 2, 5), {"size": 3}),
        ((1, 2, 5), {"scale_factor": 1.7, "mode": "linear"}),
        ((1, 1, 3, 4), {"scale_factor": (1.5, 0.6), "mode": "bilinear"}),
        ((1, 1, 5, 4), {"size": (3, 2), "mode": "bilinear"}),
        ((1, 1, 2, 3, 2), {"scale_factor": 1.9, "mode": "trilinear"}),
        ((1, 1, 3, 4), {"scale_factor": 2.6, "mode": "nearest"}),
    ],
    "linear": [((1, 3, 4), {"weight": constant(3, 4)}), ((1, 4), {"weight": constant(3, 4)})],
    "batch_norm": [((1, 2, 3), {"running_mean": constant(2), "running_var": constant(2).abs() + 0.01, "weight": constant(2)})],
    "layer_norm": [((1, 2, 3), {"normalized_shape": (3,), "weight": constant(3)}), ((1, 2, 3), {"normalized_shape": (2, 3)})],
    "group_norm": [((1, 4, 3), {"num_groups": 2, "weight": constant(4)})],
    "pad": [((1, 2, 3, 4), {"pad": (1, 2)})],
    "pixel_shuffle": [((1, 4, 2, 2), {"upscale_factor": 2})],
    "pixel_unshuffle": [((1, 1, 4, 4), {"downscale_factor": 2})],
    "channel_shuffle": [((1, 4, 2, 1), {"groups": 2})],
    "softmax": [(PLAIN, {"dim": 1})],
    **{f"dropout{d}": [((1, 2, 4), {})] for d in ("", "1d", "2d", "3d")},
    "flatten": [(PLAIN, {})],
    "unflatten": [(PLAIN, {"dim": -1, "sizes": (2, 2)})],
    "reshape": [(PLAIN, {"shape": (2, 4)})],
    "view": [(PLAIN, {"size": (2, 4)}), (PLAIN, {"dtype": torch.int64})],
    "expand": [(PLAIN, {"size": (1, 2, 3, 4)})],
    "permute": [(PLAIN, {"dims": (0, 3, 1, 2)})],
    "transpose": [(PLAIN, {"dim0": 1, "dim1": -1})],
    "swapaxes": [(PLAIN, {"axis0": 1, "axis1": -1})],
    "movedim": [(PLAIN, {"source": 1, "destination": -1})],
    "unsqueeze": [(PLAIN, {"dim": 1})],
    "chunk": [(PLAIN, {"chunks": 2, "dim": 1})],
    "split": [(PLAIN, {"split_size": 1, "dim": 1})],
    "split(function)": [(PLAIN, {"split_size_or_sections": 1, "dim": 1})],
    "tensor_split": [
        (PLAIN, {"indices": (1, 3), "dim": -1}), (PLAIN, {"sections": 2, "dim": 1}),
        (PLAIN, {"tensor_indices_or_sections": torch.tensor([1, 2]), "dim": -1}),
    ],
    "unbind": [(PLAIN, {})],
    "roll": [(PLAIN, {"shifts": 1})],
    "flip": [(PLAIN, {"dims": (1,)})],
    "narrow": [(PLAIN, {"dim": -1, "start": 1, "length": 2})],
    "select": [(PLAIN, {"dim": -1, "index": 1})],
    "t": [((2, 4), {})],
    **{name: [(PLAIN, {"tensors": [INPUT, TWICE, constant(*PLAIN)]})] for name in (
        "cat", "concat", "concatenate", "stack", "hstack", "vstack",
    )},
    **{name: [(PLAIN, {"other": 2.5}), (PLAIN, {"input": constant(3, 4), "other": INPUT})] for name in (
        "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide",
        "iadd", "isub", "imul", "truediv", "itruediv",
    )},
    **{name: [(PLAIN, {}), (PLAIN, {"dim": 1})] for name in ("sum", "mean")},
    "getitem": [(PLAIN, {"index": (0, 1)})],
    **{name: [(PLAIN, {"max": 0.5})] for name in ("clamp", "clip")},
}  # fmt: skip
"""By the name of a function or method, without the underscore of its in-place form."""

MADE = {
    nn.Linear: [((1, 3, 4), {"in_features": 4, "out_features": 3})],
    nn.Flatten: [((1, 2, 3), {})],
    nn.LayerNorm: [((1, 2, 3), {"normalized_shape": 3}), ((1, 2, 3), {"normalized_shape": (2, 3)})],
    nn.GroupNorm: [((1, 4, 3), {"num_groups": 2, "num_channels": 4})],
    nn.Unflatten: [(PLAIN, {"dim": -1, "unflattened_size": (2, 2)})],
    nn.PixelShuffle: BASES["pixel_shuffle"],
    nn.PixelUnshuffle: BASES["pixel_unshuffle"],
    nn.ChannelShuffle: BASES["channel_shuffle"],
    nn.Softmax: [(PLAIN, {"dim": -1})],
    nn.Upsample: BASES["interpolate"],
    **{kind: [(_IMAGES[d], {"padding": 1}), (_IMAGES[d], {"padding": (-1, 2) + (0, 0) * (d - 1)})] for d, kind in enumerate(
        (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), 1)},
    **{kind: [(_IMAGES[d], {"padding": 1, "value": 2.0})] for d, kind in enumerate(
        (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), 1)},
    **{kind: [(_IMAGES[d], {"in_channels": 2, "out_channels": 2, "kernel_size": k})] for d, (kind, k) in enumerate(
        ((nn.Conv1d, 3), (nn.Conv2d, 3), (nn.Conv3d, 2)), 1)},
    **{kind: [(_IMAGES[d], {"in_channels": 2, "out_channels": 2, "kernel_size": k})] for d, (kind, k) in enumerate(
        ((nn.ConvTranspose1d, 3), (nn.ConvTranspose2d, 3), (nn.ConvTranspose3d, 2)), 1)},
    **{kind: BASES[f"max_pool{d}d"] for d, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)},
    **{kind: BASES[f"avg_pool{d}d"] for d, kind in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)},
    **{kind: BASES[f"adaptive_max_pool{d}d"] for d, kind in enumerate(
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)},
    **{kind: BASES[f"adaptive_avg_pool{d}d"] for d, kind in enumerate(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)},
    **{kind: [(_IMAGES[d], {"num_features": 2})] for d, kind in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)},
    **{kind: [((1, 2, 4), {})] for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
}  # fmt: skip
"""By class: shape of the input, arguments of the constructor."""

# ---------------------------------------------------------------------------------------------------------------------------
# what to call it with: values of an argument, by its name or by call and name; what PyTorch does not take is left out

_OUT = [torch.zeros(0, dtype=torch.float64)]
_DTYPES = [torch.float64, torch.float32, torch.int64, torch.float16, torch.complex64]
_OTHER = [2.5, -3, 0.25, True, constant(4), constant(3, 4), constant(2, 1, 1), constant(1, 2, 3, 4), INPUT, TWICE, COLUMN]
_BOUNDS = [0.3, -0.2, constant(4), constant(3, 4), constant(1, 2, 5, 4), TWICE, COLUMN]

VALUES = {
    "normalized_shape": [(3,), (2, 3), 3],
    ("group_norm", "num_groups"): [1, 2, 4],
    "num_groups": [1, 4],
    "num_channels": [4],
    ("layer_norm", "eps"): [1e-3, 0.5, 0.0],
    ("group_norm", "eps"): [1e-3, 0.5, 0.0],
    "elementwise_affine": [True, False],
    "out": _OUT,
    "inplace": [True, False],
    "dtype": _DTYPES,
    "device": ["cpu"],
    "layout": [torch.strided],
    "copy": [True],
    "non_blocking": [True],
    "pin_memory": [False],
    "dim": [-1, 1, 0, -2, 2, (1, -1), (-1, -2, 1), None],
    "dims": [(0, 3, 1, 2), (-1, 0, 2, 1), (1,), (-1, 1), (), 1, (1, 2)],
    "keepdim": [True, False],
    "alpha": [5, -3.5, 0, 0.25, True],
    "other": _OTHER,
    "min": _BOUNDS,
    "max": _BOUNDS,
    "min_val": [-0.2, 0.5, -3],
    "max_val": [0.2, 3, 2.0],
    "rounding_mode": [None, "floor", "trunc"],
    "negative_slope": [0.2, -4.0, 3.0, 7],
    "beta": [0.5, 5, 1],
    "threshold": [20, 3, 40.0],
    "lambd": [0.0, 0.9],
    "approximate": ["none", "tanh"],
    "_stacklevel": [3],
    "memory_format": [torch.contiguous_format, torch.preserve_format],
    "weight": [TWICE],
    "bias": [None, constant(2), constant(3), TWICE],
    "stride": [1, 2, 3, (2,)],
    "padding": [0, 1, (1,), "same", "valid"],
    "padding_mode": ["zeros", "circular", "reflect", "replicate"],
    "dilation": [1, 2],
    "groups": [1, 2],
    "kernel_size": [1, 2, 3, (2,)],
    "ceil_mode": [True, False],
    "return_indices": [True, False],
    "count_include_pad": [False, True],
    "divisor_override": [1, -3, 5, None],
    "output_size": [1, 3, 5, (3,)],
    "size": [7, 2, 3, (4,), (3, 5)],
    "scale_factor": [2.0, 0.6, 1.3, (1.4, 2.2)],
    "mode": ["nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic", "area"],
    "align_corners": [True, False],
    "recompute_scale_factor": [True, False],
    "antialias": [True, False],
    "running_mean": [constant(2), None],
    "running_var": [torch.tensor([1e-8, 3.0], dtype=torch.float64), None, Moving(lambda y: y.flatten()[:2].abs())],
    "training": [True, False],
    "momentum": [0.5, None],
    "eps": [1e-3, 1e-9],
    "p": [0.9, 0.0],
    "track_running_stats": [False, True],
    "affine": [False, True],
    "sizes": [(2, 2), (-1, 1), (1, 4)],
    "unflattened_size": [(2, 2), (-1, 1)],
    "start_dim": [1, -2, 0],
    "end_dim": [2, -1, -2],
    "shape": [(1, 8), (-1, 2), (4, 2, 1)],
    "dim0": [-1, 0, 2],
    "dim1": [-1, 0, 2],
    "axis0": [-1, 0, 2],
    "axis1": [-1, 0, 2],
    "source": [1, -1, (0, -1)],
    "destination": [-1, 0, (2, 1)],
    "chunks": [1, 3, 5],
    "split_size": [1, 2, 3, (1, 1)],
    "split_size_or_sections": [1, 2, 3, (1, 1)],
    "split_sizes": [(1, 1)],
    "indices": [(3, 1), (1, 1), (-1, 1), (2, -3, 0), (0, 9), (9, 0)],
    "sections": [1, 3],
    "tensor_indices_or_sections": [torch.tensor([3, 0]), torch.tensor(2)],
    "shifts": [1, -5, (1, 2)],
    "start": [0, -2, torch.tensor(1)],
    "length": [0, 1],
    "index": [0, -1],
    "tensors": [[INPUT], [INPUT, INPUT, INPUT], [TWICE, constant(*PLAIN), COLUMN], (INPUT, INPUT)],
    "pad": [(1, 1), (-1, 2), (0, 0, 2, 1), (-1, -1, 1, 0), ()],
    "value": [3.0, -1, None],
    "upscale_factor": [1, 2],
    "downscale_factor": [1, 2, 4],
    ("roll", "dims"): [1, -1, (1, -1), (3, 3)],
    ("expand", "size"): [(1, 2, 3, 4), (-1, -1, 5, -1), (2, 1, 2, 1, 4), (1, 2, 1, 4)],
    ("view", "size"): [(1, 8), (-1, 2), torch.int64, torch.float64],
    ("view", "dtype"): [torch.int64, torch.int32, torch.float64],
    ("pad", "mode"): ["constant", "reflect", "replicate", "circular"],
    ("softmax", "dim"): [-1, 0, 2, None],
    ("getitem", "index"): [
        0, -1, (0, 1), (0, slice(None), 0), (slice(None), [1, 1, 0, 1]), (slice(None), [-1, 1]), (Ellipsis, None),
        (0, [0, 1], 0, [0, 0]), (Ellipsis, torch.tensor([3, 3, -1])), (slice(None), slice(None, None, 2)), None,
        (Ellipsis, torch.tensor([True, False, True, True])), Ellipsis, torch.zeros(3, dtype=torch.int64),
    ],
    ("leaky_relu", "inplace"): [True],
    ("elu", "alpha"): [3.0, 0.5, -2.0, 0.0],
    ("celu", "alpha"): [3.0, 0.5, -2.0],
    ("stack", "dim"): [0, 1, -1, -5],
    **{(name, "dim"): [1, -1, 0, 3] for name in (
        "cat", "concat", "concatenate", "chunk", "split", "unbind", "select", "narrow", "tensor_split",
    )},
    **{(name, "bias"): [True, False] for name in (
        "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    )},
    "output_padding": [0, 1, (1,)],
    **{(name, "padding"): [1, (1, 0) * 3, 2] for name in ("ZeroPad3d", "ConstantPad3d")},
    **{(name, "padding"): [1, (-1, 2), (-1, 1, 2, 0)] for name in ("ZeroPad1d", "ZeroPad2d", "ConstantPad1d", "ConstantPad2d")},
    **{(name, "dim"): [-1] for name in ("unflatten", "Unflatten")},
}  # fmt: skip

NOT_TAKEN = {
    ("expand", "implicit"): "torch.jit alone sets it",
    ("split", "split_sizes"): "the name in the schema of what Python calls split_size",
    **{(name, "out"): "Python has no such argument" for name in (
        "clone", "linear", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "rsub", "adaptive_avg_pool1d", "avg_pool1d",
        "relu", "roll", "flip", "linear",
    )},
    ("to", "layout"): "Python has no such argument",
    ("to", "pin_memory"): "Python has no such argument",
    ("Hardtanh", "min_value"): "an old name of min_val",
    ("Hardtanh", "max_value"): "an old name of max_val",
}  # fmt: skip
"""Arguments of a schema that cannot be given."""
