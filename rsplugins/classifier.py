"""A Classifier: any ``nn.Module`` made into a function from raw [0, 1] pixels to logits, with everything else inside it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from rsplugins import checks, doubts
from rsplugins.double import arrived
from rsplugins.errors import OutputValueError, ParameterError, UsageError

ChannelValues = float | Sequence[float] | Tensor
"""One number for all channels, or one for each."""


_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as int64


class Classifier(nn.Module):
    """An ``nn.Module`` from raw [0, 1] pixels to logits, with resizing and normalisation inside, in eval mode.

    A radius is a distance between raw images, so every map between the image that the user holds and the network belongs to the
    function that is certified. :func:`wrap` makes one; the constructor does the same without running the model.

    Shapes:
        input: (B, C, H, W), or (B, C, T, H, W) for video; floating; [0, 1] but for the noise of a certifier.
        output: (B, K) logits.

    Attributes:
        module: the wrapped network.
        mean: by channel, shape (C,) or (1,), or None.
        std: by channel, shape (C,) or (1,), or None.
        input_size: shape of one raw image, (C, H, W) or (C, T, H, W), or None when any will do.
        num_classes: K, or None until :meth:`check_images` has seen an image.
        resize: (H, W) that the images are brought to inside, or None.
        source: the reference it was loaded from, such as ``"timm:resnet18"``, or a few words.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: ChannelValues | None = None,
        std: ChannelValues | None = None,
        input_size: Sequence[int] | None = None,
        num_classes: int | None = None,
        resize: tuple[int, int] | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        self.module = module
        self.input_size = _size("input_size", input_size, (3, 4))
        self.num_classes = num_classes
        self.resize = _size("resize", resize, (2,))
        self.source = source or type(module).__name__
        channels = None if self.input_size is None else self.input_size[0]
        # Not persistent: a state dict of the Classifier is the module's own, whatever the normalisation.
        for name, values in (("mean", mean), ("std", std)):
            buffer = _channel_values(name, values, channels)
            self.register_buffer(name, None if buffer is None else buffer.to(self.device), persistent=False)
        # How images of any size are brought to input_size, where the model's own configuration says it: see
        # rsplugins.data.preparation.plan. No part of the function.
        self.preparation: dict[str, Any] | None = None
        self._fingerprint: tuple[Any, str] | None = None
        self._doubted = False
        try:
            self.eval()
        except NotImplementedError as error:
            _check_exported(module, error)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) or videos (B, C, T, H, W). No range check: noise leaves [0, 1]."""
        logits: Tensor = self.module(self.preprocess(x))
        return logits

    def preprocess(self, x: Tensor) -> Tensor:
        """Return what ``module`` is given: images resized, normalised and cast."""
        if self.resize is not None and tuple(x.shape[-2:]) != self.resize:
            x = resized(x, self.resize)
        return self.normalised(x).to(self.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std by channel, in the dtype of ``x``: an increasing map, so boxes become boxes."""
        trailing = (1,) * (x.dim() - 2)
        if self.mean is not None:
            x = x - self.mean.to(x.dtype).view(-1, *trailing)
        if self.std is not None:
            x = x / self.std.to(x.dtype).view(-1, *trailing)
        return x

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU when there is none."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter or buffer; float32 when there is none. Inputs are cast to it."""
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), torch.float32)

    def check_images(self, x: Tensor, *, any_size: bool = False) -> None:
        """Check images that a user passed in, and learn ``num_classes`` from them when nobody has said it.

        Args:
            x: images (N, C, H, W) or videos (N, C, T, H, W).
            any_size: allow another size than ``input_size``, for certifiers that cut windows of that size out of the images.

        Raises:
            InputValueError: not a floating tensor, wrong shape or channel order, not finite, or outside [0, 1]; float64 where
                the model's device has none.
            OutputValueError: when the model, run to learn ``num_classes``, does not return logits.
        """
        checks.check_shape(x, None if any_size else self.input_size, self._channels())
        checks.check_values(x)
        first = arrived(x[:1], self.device)
        if self.num_classes is None and len(x) > 0 and not any_size:
            self.num_classes = self._probe(first)
        if len(x) > 0 and not any_size:
            self._doubt(first)

    def _doubt(self, x: Tensor) -> None:
        """Warn once where mean and std are given for a network that normalises by itself."""
        if not self._doubted and (self.mean is not None or self.std is not None):
            doubts.about_normalisation(self.trial_copy().module, self.preprocess(x.to(self.device)))
        self._doubted = True

    def check_logits(self, logits: Any, batch: int | None = None) -> None:
        """Check what the model returned.

        Args:
            logits: the output of ``forward``.
            batch: how many images went in, when known.

        Raises:
            OutputValueError: not a (B, K) tensor, K other than ``num_classes``, NaN or infinite.
        """
        checks.check_logits(logits, num_classes=self.num_classes, batch=batch)

    def check_ready(self) -> None:
        """Check that every layer is in eval mode, and gives each image of a batch what it would give it alone.

        Raises:
            UsageError: naming the first layer in training mode, or batch normalisation without statistics of its own: their
                output would depend on the batch or on chance.
        """
        training = [(name, layer) for name, layer in self.named_modules() if layer.training]
        if not training:
            self._check_statistics()
            return
        # The innermost is the informative one: `bn1 (BatchNorm2d)`, not the container it sits in.
        name, layer = next(((n, m) for n, m in training if not any(True for _ in m.children())), training[0])
        raise UsageError(
            f"The model is in training mode, first at layer {checks.layer_name(name, layer)}.",
            cause="train() was called after wrap(), which had put the model in eval mode; batch normalisation and dropout then "
            "make the prediction depend on the other images and on chance, and no certificate holds.",
            fix="Call classifier.eval() before certifying.",
        )

    def _check_statistics(self) -> None:
        for name, layer in self.named_modules():
            # Instance normalisation, which is no _BatchNorm, takes the statistics of one image.
            if isinstance(layer, _BatchNorm) and (layer.running_mean is None or layer.running_var is None):
                raise UsageError(
                    f"Layer {checks.layer_name(name, layer)} normalises with the statistics of the batch, in eval mode too.",
                    cause="it was made with track_running_stats=False and keeps none; the prediction then depends on the other "
                    "images and samples of the batch, and no certificate holds.",
                    fix="Give the layer track_running_stats=True and train it, or use group or instance normalisation.",
                )

    def _channels(self) -> int | None:
        if self.input_size is not None:
            return int(self.input_size[0])
        lengths = [len(values) for values in (self.mean, self.std) if values is not None and len(values) > 1]
        return lengths[0] if lengths else None

    def _probe(self, x: Tensor) -> int:
        """Run the model once and return how many logits came out.

        Raises:
            OutputValueError: naming the layer, when the model fails or returns something else than logits.
        """
        x = x.to(self.device)
        spare = self.trial_copy()
        try:
            with torch.no_grad():
                logits = spare(x)
            self.check_logits(logits, batch=len(x))
        except OutputValueError as error:
            layer = checks.first_layer_not_finite(spare, x)
            if not layer:
                raise
            raise OutputValueError(
                f"{error.what} It is first seen after layer {layer}.", cause=error.cause, fix=error.fix
            ) from None
        except Exception as error:
            raise checks.forward_error(spare, x, error) from error
        return int(logits.shape[1])

    def trial_copy(self) -> Classifier:
        """Return a copy with the same weights, for a trial that leaves the model as it was given.

        A model that keeps something of its first images would keep the trial's, and be another function from then on; no later
        check could tell. Weights are shared and buffers copied. Returns the Classifier itself where it cannot be copied (a part
        that is compiled, or holds what Python does not copy), or where a first pass is to make its weights.
        """
        layers = list(self.modules())
        if any(isinstance(layer, LazyModuleMixin) or hasattr(layer, "_orig_mod") for layer in layers):
            return self
        tensors = [value for layer in layers for value in (*layer._parameters.values(), *vars(layer).values())]
        shared = {id(value): value for value in tensors if isinstance(value, Tensor)}
        try:
            return copy.deepcopy(self, shared)
        except Exception:
            return self

    def fingerprint(self) -> str:
        """Return the sha256 of the function's numbers: names, dtypes, shapes and bytes of the weights, normalisation, resizing.

        The same on every device and in every process. Kept until a number is changed, in whatever way, or moved.
        """
        state = {_plain_name(name): value for name, value in self.module.state_dict().items()}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        others = [(name, repr(value)) for name, value in state.items() if name not in tensors]
        tensors |= {name: value for name, value in (("=mean", self.mean), ("=std", self.std)) if value is not None}
        # Version counters see optimizers, load_state_dict and in-place operations, but neither ``.data`` nor numpy.
        seen = [
            (name, value.dtype, value.shape, value.stride(), value.data_ptr(), None if value.is_inference() else value._version)
            for name, value in tensors.items()
        ]
        key = (*others, *seen, _checksums(tensors.values()), self.resize)
        if self._fingerprint is None or self._fingerprint[0] != key:
            digest = hashlib.sha256()
            for name in sorted(state):
                _digest_value(digest, name, state[name])
            for name, values in (("mean", self.mean), ("std", self.std)):
                digest.update(f"{name}={None if values is None else values.tolist()}\n".encode())
            digest.update(f"resize={self.resize}\n".encode())
            self._fingerprint = (key, digest.hexdigest())
        return self._fingerprint[1]

    def extra_repr(self) -> str:
        """Return what happens before the network, for ``repr``."""
        shown = {"input_size": self.input_size, "mean": _plain_values(self.mean), "std": _plain_values(self.std)}
        shown |= {"resize": self.resize, "num_classes": self.num_classes, "source": self.source}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items() if value is not None)

    def structure(self) -> str:
        """Return the sha256 of what the function is besides its numbers: the layers' classes, settings and plain attributes.

        Two networks with the same weights may differ in an activation or a stride. Code and values that a module keeps elsewhere
        are not seen, and releases of a library may describe a layer in other words.
        """
        digest = hashlib.sha256()
        for name, layer in self.module.named_modules():
            kind = type(layer)
            digest.update(f"{name} {kind.__module__}.{kind.__qualname__}({layer.extra_repr()})\n".encode())
            plain = {key: value for key, value in vars(layer).items() if key != "training" and not key.startswith("_")}
            digest.update(f"{sorted((key, repr(value)) for key, value in plain.items() if _is_plain(value))}\n".encode())
            for key in sorted(layer._non_persistent_buffers_set):
                _digest_value(digest, f"{name}.{key}", layer._buffers[key])
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a manifest records about the function, as plain JSON values."""
        return {
            "source": self.source,
            "architecture": type(self.module).__name__,
            "input_size": None if self.input_size is None else list(self.input_size),
            "num_classes": self.num_classes,
            "mean": _plain_values(self.mean),
            "std": _plain_values(self.std),
            "resize": None if self.resize is None else list(self.resize),
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "sha256": self.fingerprint(),
            "structure": self.structure(),
        }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def wrap(
    module: nn.Module,
    mean: ChannelValues | None = None,
    std: ChannelValues | None = None,
    input_size: Sequence[int] | None = None,
    num_classes: int | None = None,
    *,
    resize: tuple[int, int] | None = None,
    source: str = "",
) -> Classifier:
    """Make a Classifier from a module: raw [0, 1] pixels in, logits out, normalisation inside, eval mode.

    Args:
        module: takes normalised images, returns logits (B, K). It is put in eval mode, not copied.
        mean: subtracted by channel; on the scale of [0, 1] pixels. Leave it out when the module normalises by itself.
        std: divided by, channel by channel; on the scale of [0, 1] pixels.
        input_size: shape of one raw image, (C, H, W), or (C, T, H, W) for video. When given, the model is run once on zeros,
            which finds ``num_classes`` and shows early what does not fit.
        num_classes: checked against that pass when both are given.
        resize: (H, W) that the module needs when it is not the raw images' size; bilinear, inside the Classifier, so that the
            radius stays one of raw pixels.
        source: a few words on where the model comes from, for records.

    Returns:
        The Classifier. A Classifier passed in comes back as it is.

    Warns when mean or std are given for a network that begins with a normalisation of its own.

    Raises:
        ParameterError: ``module`` is not an ``nn.Module``, or mean, std or a size is malformed.
        OutputValueError: the pass on zeros failed (naming the layer) or gave something else than finite (1, num_classes) logits.

    Example:
        >>> import torch
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> classifier = wrap(module, mean=0.3, std=0.4, input_size=(1, 8, 8))
        >>> classifier.num_classes, classifier(torch.zeros(2, 1, 8, 8)).shape
        (10, torch.Size([2, 10]))
    """
    if isinstance(module, Classifier):
        if (mean, std, input_size, num_classes, resize) != (None,) * 5:
            raise UsageError(
                "wrap() was given a Classifier, which already has its normalisation and sizes inside.",
                cause="load() and wrap() return a Classifier; wrapping it again would normalise twice.",
                fix="Use it as it is, or wrap its .module with the values you want.",
            )
        return module
    if not isinstance(module, nn.Module):
        raise ParameterError(
            f"wrap() takes a torch.nn.Module; it was given {type(module).__name__}.",
            cause="a model class or function in place of a model object, or a name.",
            fix='Pass an instance, such as wrap(resnet18()); for a name use rsplugins.load("timm:resnet18").',
        )
    classifier = Classifier(
        module, mean=mean, std=std, input_size=input_size, num_classes=num_classes, resize=resize, source=source
    )
    if classifier.input_size is not None:
        zeros = torch.zeros(1, *classifier.input_size)
        classifier.num_classes = classifier._probe(zeros)
        classifier._doubt(zeros)
    return classifier


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return images (B, C, H, W) or videos (B, C, T, H, W) at another (H, W), bilinear: what a Classifier does inside."""
    # Frames of a video are resized one by one: (B, C, T, H, W) -> (B, C*T, H, W) and back.
    frames = x if x.dim() == 4 else x.flatten(1, 2)
    frames = F.interpolate(frames, size=list(size), mode="bilinear", align_corners=False)
    return frames.view(*x.shape[:-2], *size)


def _check_exported(module: nn.Module, error: NotImplementedError) -> None:
    """Let a program of ``torch.export`` pass, which has no modes, where it is one in eval mode for batches of any length."""
    graph = getattr(module, "graph", None)
    if graph is None:
        raise error
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    random = ("dropout", "rand", "bernoulli")
    for node in graph.nodes:
        name = str(node.target)
        trains = "batch_norm" in name and any(value is True for value in node.args[5:6])
        if node.op == "call_function" and (trains or any(word in name for word in random)):
            raise UsageError(
                f"The exported program has {node.target} at {node.name}, as in training mode.",
                cause="the model was exported without eval(), and an exported program cannot change its mode.",
                fix="Export it again after model.eval().",
            ) from None
    if any(isinstance(value.shape[0], int) for value in inputs if value.dim() > 1):
        raise UsageError(
            f"The exported program takes batches of {inputs[0].shape[0]} only, and certifiers choose theirs.",
            cause="it was exported without a dynamic first dimension.",
            fix='Export it with dynamic_shapes=({0: torch.export.Dim("batch")},).',
        ) from None
    for layer in module.modules():
        layer.training = False


def _size(name: str, value: Sequence[int] | None, lengths: tuple[int, ...]) -> Any:
    if value is None:
        return None
    try:
        size = tuple(int(side) for side in value)
    except (TypeError, ValueError):
        size = ()
    if len(size) not in lengths or min(size) < 1:
        shapes = {"resize": "(H, W)", "input_size": "(C, H, W), or (C, T, H, W) for video"}
        raise ParameterError(f"{name} is {value!r}; expected {shapes[name]}, all at least 1.")
    return size


def _channel_values(name: str, value: ChannelValues | None, channels: int | None) -> Tensor | None:
    if value is None:
        return None
    try:
        values = torch.as_tensor(value, dtype=torch.float32).detach().clone().cpu().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"{name} is {value!r}; expected one number, or one for each channel.") from error
    if channels is not None and len(values) not in (1, channels):
        raise ParameterError(
            f"{name} has {len(values)} values for {channels} channels.",
            cause=f"{name} and input_size belong to different models, or input_size is not channels first.",
            fix="Give one value for each channel, or one for all; input_size is (C, H, W).",
        )
    if not bool(values.isfinite().all()) or (name == "std" and bool((values <= 0).any())):
        raise ParameterError(f"{name} is {values.tolist()}; expected finite{' positive' if name == 'std' else ''} numbers.")
    if bool((values.abs() > 10).any()):
        raise ParameterError(
            f"{name} is {values.tolist()}, too large for images in [0, 1].",
            cause="the values are for pixels from 0 to 255.",
            fix=f"Divide {name} by 255.",
        )
    return values


def _plain_values(values: Tensor | None) -> list[float] | None:
    # Seven digits are all that float32 holds; 0.305 stays 0.305.
    return None if values is None else [float(f"{value:.7g}") for value in values.tolist()]


def _plain_name(name: str) -> str:
    # torch.compile puts its own name into the state dict; the weights are the same.
    return re.sub(r"(^|\.)_orig_mod\.", r"\1", name)


def _checksums(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return numbers that change with the bytes of tensors; each device is waited for once."""
    sums: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            sums.setdefault(tensor.device, []).append(checksum(tensor))
        return tuple((str(device), *torch.stack(found).tolist()) for device, found in sums.items())


def checksum(tensor: Tensor) -> Tensor:
    """Return an int64 on the tensor's device, from its bytes in the order of memory, which needs no copy of a dense tensor."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
    data = tensor.detach().permute(order).reshape(-1).contiguous().view(torch.uint8)
    if len(data) % 8:
        data = F.pad(data, (0, -len(data) % 8))
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    # Mixed with its place, so that an exchange counts, and shifted, as flipped signs can cancel out in a sum.
    mixed = torch.arange(len(words), device=words.device).mul_(_ODD).add_(words).mul_(_ODD)
    return mixed.bitwise_xor_(mixed >> 32).sum()


def _digest_value(digest: hashlib._Hash, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name}={value!r}\n".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    data = value.detach().cpu().contiguous().reshape(-1)
    if data.numel():
        digest.update(data.view(torch.uint8).numpy().data)
