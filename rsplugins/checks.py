"""Checks of images and logits, each with the likely cause read off the values themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.errors import InputValueError, OutputValueError

TOLERANCE = 1e-6
"""How far outside [0, 1] a pixel may be: float32 rounding, no more."""


def check_shape(x: Any, input_size: Sequence[int] | None, channels: int | None) -> None:
    """Check dtype and shape of images.

    Args:
        x: what the user passed in.
        input_size: shape of one image as the model expects it, or None when any will do.
        channels: number of channels, when it is known although ``input_size`` is not.

    Raises:
        InputValueError: with the likely cause.
    """
    if not isinstance(x, Tensor):
        raise InputValueError(
            f"The images are a {type(x).__name__}; expected a float tensor of shape (N, C, H, W).",
            fix="Convert them first, for instance torch.as_tensor(images, dtype=torch.float32).",
        )
    if not x.is_floating_point():
        is_bytes = x.numel() > 0 and x.dtype != torch.bool and int(x.max()) > 1
        raise InputValueError(
            f"The images have dtype {x.dtype}; expected floating values in [0, 1].",
            cause="8-bit pixels from 0 to 255." if is_bytes else "an integer tensor.",
            fix="Use images.float() / 255." if is_bytes else "Use images.float().",
        )
    expected = tuple(input_size) if input_size is not None else None
    good = x.dim() in (4, 5) if expected is None else tuple(x.shape[1:]) == expected
    good = good and (channels is None or x.shape[1] == channels)
    if not good or (expected is None and _looks_channels_last(x, channels)):
        raise _shape_error(tuple(x.shape), expected, channels)


def _looks_channels_last(x: Tensor, channels: int | None) -> bool:
    return channels is None and x.dim() == 4 and x.shape[-1] in (1, 3) and x.shape[1] > 4 and x.shape[1] == x.shape[2]


def _shape_error(shape: tuple[int, ...], expected: tuple[int, ...] | None, channels: int | None) -> InputValueError:
    wanted = f"(N, {', '.join(map(str, expected))})" if expected else f"(N, {channels or 'C'}, H, W)"
    cause, fix = _shape_cause(shape, expected, channels)
    return InputValueError(f"The images have shape {shape}; expected {wanted}.", cause=cause, fix=fix)


def _shape_cause(shape: tuple[int, ...], expected: tuple[int, ...] | None, channels: int | None) -> tuple[str, str]:
    image, last = shape[1:], (*shape[2:], shape[1]) if len(shape) > 1 else shape
    likely_channels = (expected[0],) if expected else (channels,) if channels else (1, 3)
    if shape == expected or (expected is None and len(shape) == 3):
        return "a single image without the batch dimension.", "Use images[None] (images.unsqueeze(0))."
    if len(shape) >= 4 and shape[1] not in likely_channels and shape[-1] in likely_channels:
        order = ", ".join(str(i) for i in (0, len(shape) - 1, *range(1, len(shape) - 1)))
        return "channels last (H, W, C) instead of channels first.", f"Use images.permute({order})."
    if expected is not None and len(expected) == 4 and len(image) == 4 and (image[1], image[0], *image[2:]) == expected:
        return "frames before channels (T, C, H, W).", "Use images.transpose(1, 2)."
    if len(expected or (1, 1, 1)) == 3 and len(image) == 2:
        return "grey images without a channel dimension.", "Use images.unsqueeze(1)."
    if len(image) == len(expected or image) and image[0] not in likely_channels and likely_channels != (1, 3):
        return (
            f"{image[0]} channels where the model takes {likely_channels[0]}.",
            "Use data with that many channels, or repeat the grey channel: images.expand(-1, 3, -1, -1).",
        )
    if expected is not None and last != expected and len(image) == len(expected):
        return (
            "images of another size than the model takes.",
            f"Prepare the images at {expected}, or let the model resize: wrap(..., input_size={image}, resize={expected[-2:]}).",
        )
    return "", "Pass images as (N, C, H, W), videos as (N, C, T, H, W)."


def check_values(x: Tensor, *, normalises: bool = True) -> None:
    """Check that floating images are finite and in [0, 1].

    Args:
        x: floating images.
        normalises: whether what takes them normalises by itself, as a Classifier does: tells the likely cause.

    Raises:
        InputValueError: with the likely cause, read off the values.
    """
    if x.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not (torch.isfinite(torch.tensor([low, high])).all()):
        index = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise InputValueError(
            f"The images are not finite: NaN or infinity, first in image {index}.",
            cause="a division by zero while they were prepared, or a damaged file.",
            fix="Drop or repair these images.",
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        cause, fix = _range_cause(low, high, normalises)
        raise InputValueError(
            f"The images have values from {low:.4g} to {high:.4g}; expected raw pixels in [0, 1].", cause=cause, fix=fix
        )


def _range_cause(low: float, high: float, normalises: bool) -> tuple[str, str]:
    if low >= -TOLERANCE and high > 8:
        return "pixels from 0 to 255.", "Divide by 255."
    if low >= -0.02 and high <= 1.02:
        return "overshoot of a bicubic resize, or noise.", "Use images.clamp(0, 1)."
    if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE:
        return "pixels scaled to [-1, 1].", "Use (images + 1) / 2, and give wrap() mean=0.5, std=0.5."
    if low < -0.02 and high < 8 and low > -8:
        if not normalises:
            return (
                "normalised images: mean and std were applied already, so that eps, sigma and [0, 1] would be in other units.",
                "Pass the raw pixels (take Normalize out of the data transform), and put mean and std into the model: "
                "rsplugins.wrap(model, mean=..., std=...).",
            )
        return (
            "normalised twice: mean and std were applied already, and the Classifier applies its own.",
            "Pass the raw pixels (take Normalize out of the data transform); wrap() is where mean and std belong.",
        )
    return "an unknown scale.", "Bring the images to [0, 1] first."


def check_logits(logits: Any, *, num_classes: int | None, batch: int | None) -> None:
    """Check that logits are a finite (B, K) tensor; see :meth:`rsplugins.classifier.Classifier.check_logits`."""
    if not isinstance(logits, Tensor):
        raise _not_a_tensor(logits)
    if logits.dim() != 2:
        pooled = logits.dim() in (3, 4, 5)
        raise OutputValueError(
            f"The model returned a tensor of shape {tuple(logits.shape)}; expected logits of shape (B, K).",
            cause="a feature map or token sequence: the model has no classification head."
            if pooled
            else "a loss or a single score.",
            fix="Create it with a head (timm: num_classes > 0), or wrap a module that ends in pooling and a linear layer."
            if pooled
            else "Wrap a module that returns one logit for each class.",
        )
    if batch is not None and len(logits) != batch:
        raise OutputValueError(
            f"The model returned {len(logits)} rows of logits for {batch} images.",
            cause="views or frames folded into the batch, or a reshape that assumes one batch size.",
            fix="Wrap a module that returns one row for each image.",
        )
    if logits.shape[1] < 2:
        raise OutputValueError(
            f"The model returned {logits.shape[1]} logit for each image; a classifier has at least two.",
            cause="a binary head whose one score goes through a sigmoid: its largest logit is always the same class.",
            fix="Wrap a module that returns torch.cat([-score, score], dim=1).",
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise OutputValueError(
            f"The model returned {logits.shape[1]} logits; num_classes is {num_classes}.",
            cause="a head for another data set, or features instead of logits.",
            fix=f"Give num_classes={logits.shape[1]}, or load weights whose head has {num_classes} outputs.",
        )
    finite = logits.isfinite()
    if not bool(finite.all()):
        row = int((~finite).any(1).nonzero()[0])
        raise OutputValueError(
            f"The logits are not finite: {'NaN' if bool(logits.isnan().any()) else 'infinity'} in row {row}.",
            cause="weights that are not finite, a missing normalisation, or an overflow in half precision.",
            fix="Check mean and std, load the checkpoint again, or run in float32.",
        )


def _not_a_tensor(output: Any) -> OutputValueError:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        names = ", ".join(repr(name) for name in list(output)[:5])
        fix = f"Wrap a small module that returns one entry; there are {names}."
    elif isinstance(output, Sequence):
        fix = "Wrap a small module that returns the entry with the logits."
    else:
        fix = "Wrap a small module that returns its .logits." if hasattr(output, "logits") else "Return a tensor of shape (B, K)."
    return OutputValueError(
        f"The model returned a {kind}; expected a tensor of logits of shape (B, K).",
        cause="auxiliary outputs, or a model made for another task than classification.",
        fix=fix,
    )


def first_layer_not_finite(module: nn.Module, x: Tensor) -> str:
    """Run the module and return the first layer with a NaN or infinite output as ``"name (Type)"``, or an empty string."""
    found: list[str] = []
    names = {layer: name for name, layer in module.named_modules()}

    def after(layer: nn.Module, _: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
            found.append(layer_name(names[layer], layer))

    handles = [layer.register_forward_hook(after) for layer in names]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def forward_error(module: nn.Module, x: Tensor, error: Exception) -> OutputValueError:
    """Turn an exception of a forward pass into an error that names the innermost layer it came from."""
    stack: list[str] = []
    failed: list[str] = []
    names = {layer: name for name, layer in module.named_modules()}

    def before(layer: nn.Module, _: Any) -> None:
        stack.append(layer_name(names[layer], layer))
        failed[:] = stack

    def after(layer: nn.Module, *_: Any) -> None:
        stack.pop()
        failed[:] = stack

    handles = [layer.register_forward_pre_hook(before) for layer in names]
    handles += [layer.register_forward_hook(after) for layer in names]
    try:
        with torch.no_grad():
            module(x)
    except Exception:  # the same failure again, this time with the hooks watching
        pass
    finally:
        for handle in handles:
            handle.remove()
    layer = failed[-1] if failed else "'the model itself'"
    message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return OutputValueError(
        f"The model failed on one image of shape {tuple(x.shape[1:])}, in layer {layer}: {type(error).__name__}: {message}",
        cause="input_size is not what the model takes, the channels are in another order, or a layer needs something that is "
        "not installed.",
        fix="Give wrap() the input_size the model was made for; add resize=(H, W) when the raw images have another size.",
    )


def layer_name(name: str, layer: nn.Module) -> str:
    """Return ``"'layer1.0.conv1' (Conv2d)"`` for a layer of a Classifier."""
    # Inside a Classifier the network is called `module`; the user knows its layers without that.
    return f"{name.removeprefix('module.') or 'the model itself'!r} ({type(layer).__name__})"


def named_layer(name: str, layer: nn.Module) -> str:
    """Return :func:`layer_name` for a layer of a function that this package makes of a Classifier, or of one itself."""
    # Inside these functions the network is called `classifier` and `module`.
    name = name.removeprefix("classifier").removeprefix(".")
    return layer_name("" if name == "module" else name, layer)
