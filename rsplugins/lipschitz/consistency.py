"""Whether what is analysed is what runs: no hook or override changes a layer, no chance or state the network."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn.modules import module as modules

from rsplugins.chain import computes_as
from rsplugins.classifier import Classifier
from rsplugins.errors import UsageError
from rsplugins.lipschitz.tracing import Traced


def check_untouched(classifier: Classifier) -> None:
    """Check that a Classifier runs as this package wrote it, and its network as its own layers say.

    Raises:
        UsageError: its class or object has methods of its own, or there is a hook on it or on all modules.
    """
    if not computes_as(classifier, Classifier, "preprocess", "normalised", "dtype", "device"):
        raise UsageError(
            f"{type(classifier).__name__} changes what a Classifier computes; its Lipschitz bounds are not computed.",
            cause="a subclass with its own forward, preprocess or normalised, or a hook, which the analysis would not see.",
            fix="Move the change into the network: write a torch.nn.Module around it and pass that to rsplugins.wrap.",
        )
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise UsageError(
            "Hooks are registered on all modules; Lipschitz bounds are not computed.",
            cause="torch.nn.modules.module.register_module_forward_hook, or a profiler; such a hook can change every layer.",
            fix="Remove them first.",
        )


def check_function(traced: Traced, classifier: Classifier, *, restless: bool) -> None:
    """Check on random images that two passes agree bit by bit, and the traced graph with them.

    Args:
        traced: the graph.
        classifier: what it was traced from.
        restless: weights change a little at each reading; the layers that have them are refused elsewhere.

    Raises:
        UsageError: they do not.
    """
    images = _images(traced, classifier)
    with torch.no_grad():
        first, second = (_pass(classifier, images) for _ in range(2))
        if not _agree(first, second, 1e-3 if restless else 0.0):
            raise UsageError(
                "The model is random or has state: two passes over the same images differ. Nothing was certified.",
                cause="a layer draws random numbers in eval mode, or counts or caches between passes.",
                fix="Make forward a function of its input alone.",
            )
        graph = fx.Interpreter(traced.root, graph=traced.graph).run(images.clone())
    if not _agree(first, graph, 1e-3 if restless else 1e-6):
        raise UsageError(
            "What torch.fx traced differs from the whole network on the same images. Nothing was certified.",
            cause="forward depends on something that tracing does not see: random numbers, a state, a change in place.",
            fix="Make forward a function of its input alone, written with out-of-place operations.",
        )


def check_images_apart(traced: Traced, classifier: Classifier) -> None:
    """Check on random images that the output of each is that of the image alone.

    Raises:
        UsageError: it is not.
    """
    images = _images(traced, classifier)
    with torch.no_grad():
        first, alone = _pass(classifier, images), _pass(classifier, images[:1])
    if not _agree(first[:1], alone, 1e-3):
        raise UsageError(
            "The model's output for an image depends on the other images of its batch. Nothing was certified.",
            cause="something is computed over the batch dimension, such as x - x.mean(0), or statistics of the batch.",
            fix="Compute over the other dimensions only.",
        )


def _images(traced: Traced, classifier: Classifier) -> Tensor:
    size = traced.info[traced.input].shape or ()
    return torch.rand((2, *size[1:]), generator=torch.Generator().manual_seed(0)).to(classifier.device)


def _pass(classifier: Classifier, images: Tensor) -> Tensor:
    try:
        logits: Tensor = classifier(images.clone())  # the network may write in place
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UsageError(
            f"The model does not run on a batch of two images: {reason}",
            cause="the network uses its batch size as a number, or has state.",
            fix="Make forward take any batch size.",
        ) from error
    return logits


def _agree(first: Tensor, second: Tensor, tolerance: float) -> bool:
    scale = float(first.abs().nan_to_num(0.0, 0.0, 0.0).max()) if first.numel() else 0.0
    return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
