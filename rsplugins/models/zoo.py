"""``zoo:ID``: a model of the zoo, with its own preprocessing, checked before it is loaded."""

from __future__ import annotations

from pathlib import Path

from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import CheckpointError
from rsplugins.models import architectures, checkpoint
from rsplugins.zoo import manifest as manifests
from rsplugins.zoo import store
from rsplugins.zoo.files import check_file, sha256

PACKAGES = ("rsplugins", "timm.models", "torchvision.models")


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
    _check_architecture(manifest.architecture.name, name)
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


def _check_architecture(architecture: str, name: str) -> None:
    """Refuse a manifest that would import whatever it likes: it may come from anywhere."""
    package = architecture.partition(":")[0] if ":" in architecture else ""
    if package and not any(f"{package}.".startswith(f"{known}.") for known in PACKAGES):
        raise CheckpointError(
            f"zoo:{name} names the architecture {architecture!r}, which is not imported.",
            cause=f"A manifest may name networks of {', '.join(PACKAGES)}, and those of rsplugins.",
            fix="Where you trust it, load the weights with file:PATH and architecture=MODULE:ATTRIBUTE.",
        )
