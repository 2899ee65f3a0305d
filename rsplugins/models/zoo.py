"""``zoo:ID``: a model of the zoo, with its own preprocessing, checked before it is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import CheckpointError
from rsplugins.models import architectures, checkpoint, package, store
from rsplugins.models import manifest as manifests
from rsplugins.models.files import check_file, sha256

FETCHING = re.compile(r"pretrained.*|weights.*|checkpoint.*|file|url|path|.*_fn|.*_cfg")
"""Arguments by which a constructor of timm or torchvision reads or fetches something, or is given code."""


def load(reference: str) -> Classifier:
    """Load a model of the zoo.

    Args:
        reference: its id, such as ``"digits-cnn.digits-gaussian025-v2"``.

    Raises:
        UnknownNameError: no such model; with a did-you-mean.
        CheckpointError: it has no weights (and why), or they are not those of the manifest.
    """
    return load_folder(store.find(reference), reference)


def load_folder(folder: Path, name: str = "") -> Classifier:
    """Load the model that lies in a folder.

    Args:
        folder: with a manifest and weights.
        name: what errors call it; its id by default.

    Raises:
        CheckpointError: as :func:`load`.
    """
    manifest = manifests.read(folder)
    name = name or manifest.id
    if manifest.no_weights:
        raise CheckpointError(f"zoo:{name} has no weights: {manifest.no_weights}", fix="Train it with its recipe.")
    about, spec = manifest.architecture, manifest.input
    _check_architecture(about, name)
    if manifest.package is None:
        state, match = _stored(folder, manifest), "name"
    else:
        state, match = package.read(manifest.package), manifest.package.keys
    module = network(about.name, num_classes=about.num_classes, **about.arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*put .* tensors in by their order")  # the function's digest is checked
        checkpoint.fit(module, state, f"zoo:{name}", match)
    classifier = wrap(
        module,
        mean=spec.mean,
        std=spec.std,
        input_size=spec.shape,
        num_classes=about.num_classes,
        resize=spec.resize,
        source=f"zoo:{name}",
    )
    if manifest.package is not None and classifier.fingerprint() != manifest.function_sha256:
        raise CheckpointError(f"zoo:{name}: the weights, put together, are not the function of the manifest.")
    return classifier


def network(name: str, *, num_classes: int, load: Callable[[str], Classifier] | None = None, **arguments: Any) -> nn.Module:
    """Build a network as a recipe or a manifest says it: where its arguments name another model, that one is loaded.

    Args:
        name: see :func:`rsplugins.models.architectures.resolve`.
        num_classes: of the data.
        load: what ``classifier``, a reference, is loaded with; by default models of the zoo alone.
        arguments: of the architecture.

    Raises:
        CheckpointError: a manifest names a model that is not in the zoo.
    """
    reference = arguments.get("classifier")
    if isinstance(reference, str):
        if load is None and not reference.startswith("zoo:"):
            raise CheckpointError(
                f"The model behind the denoiser is {reference!r}, which is not loaded.",
                cause="a manifest may come from anywhere, and names models of the zoo alone.",
                fix="Load that model yourself: rsplugins.denoise(rsplugins.load(...), DENOISER, sigma=...).",
            )
        found = load(reference) if load is not None else load_folder(store.find(reference.removeprefix("zoo:")))
        arguments = {**arguments, "classifier": found}
    return architectures.build(name, num_classes=num_classes, **arguments)


def load_denoiser(reference: str) -> nn.Module:
    """Load a denoiser of the zoo: that of a model made of a denoiser and a classifier.

    Args:
        reference: its id.

    Raises:
        UnknownNameError: no such model; with a did-you-mean.
        CheckpointError: it has no denoiser.
    """
    from rsplugins.denoising.network import UNetDenoiser

    folder = store.find(reference)
    manifest = manifests.read(folder)
    if manifest.architecture.name != "denoised" or not manifest.weights:
        raise CheckpointError(f"zoo:{reference} is a classifier without a denoiser.", fix="`rsplugins zoo list` has the others.")
    # Without the classifier that it was trained in front of, which may need a package of its own.
    arguments = {name: value for name, value in manifest.architecture.arguments.items() if name not in ("classifier", "sigma")}
    denoiser = UNetDenoiser(**arguments)
    state = {name.removeprefix("denoiser."): value for name, value in _stored(folder, manifest).items()}
    checkpoint.fit(denoiser, state, f"zoo:{reference}")
    return denoiser.eval()


def _stored(folder: Path, manifest: manifests.Manifest) -> checkpoint.State:
    """Return the weights that lie in a model's folder, when they are those of its manifest."""
    state: checkpoint.State = {}
    again = "Delete the model's folder and run `rsplugins zoo fetch SOURCE` with where it came from."
    for weights in manifest.weights:
        path = folder / weights.file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", fix=again)
        if path.stat().st_size != weights.bytes or sha256(path) != weights.sha256:
            check_file(path)  # says when it is an HTML page or an LFS pointer
            raise CheckpointError(
                f"{path} is not the file of its manifest: its sha256 differs.",
                cause="a damaged download, or weights that were changed without the manifest.",
                fix=again,
            )
        state |= checkpoint.read(path)
    return state


def _check_architecture(about: manifests.Architecture, name: str) -> None:
    """Refuse a manifest that would run whatever it likes, for it may come from anywhere.

    Networks of rsplugins, and those registered in timm and torchvision, by name, and with nothing that is read from elsewhere:
    a package is full of functions that import, unpickle or download what they are told to.
    """
    module, _, attribute = about.name.rpartition(":")
    if not module:
        return  # one of ours, or unknown: `build` says so
    fetching = sorted(argument for argument in about.arguments if FETCHING.fullmatch(argument))
    if _registered(module, attribute) and not fetching:
        return
    raise CheckpointError(
        f"zoo:{name} names the architecture {about.name!r}"
        + (f" with {', '.join(fetching)}" if fetching else "")
        + ", which is not built.",
        cause="A manifest may name networks of rsplugins, and the registered ones of timm.models and torchvision.models, without "
        "anything that reads or downloads: it may come from anywhere.",
        fix="Where you trust it, load the weights with file:PATH and architecture=MODULE:ATTRIBUTE.",
    )


def _registered(module: str, attribute: str) -> bool:
    if module == "timm.models":
        import timm

        return bool(timm.is_model(attribute))
    if module in ("torchvision.models", "torchvision.models.video"):
        import torchvision

        place = torchvision.models.video if module.endswith("video") else torchvision.models
        return attribute in torchvision.models.list_models(module=place)
    return False
