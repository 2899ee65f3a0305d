"""``zoo:ID``: a model of the zoo, with its own preprocessing, checked before it is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import CheckpointError
from rsplugins.models import architectures, checkpoint, store
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
    if not manifest.weights:
        raise CheckpointError(f"zoo:{name} has no weights: {manifest.no_weights}", fix="Train it with its recipe.")
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
    _check_architecture(manifest.architecture, name)
    network = architectures.build(
        manifest.architecture.name, num_classes=manifest.architecture.num_classes, **manifest.architecture.arguments
    )
    checkpoint.fit(network, state, f"zoo:{name}")
    spec = manifest.input
    return wrap(
        network,
        mean=spec.mean,
        std=spec.std,
        input_size=spec.shape,
        num_classes=manifest.architecture.num_classes,
        resize=spec.resize,
        source=f"zoo:{name}",
    )


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
