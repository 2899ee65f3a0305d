"""``zoo:ID``: a model of the zoo, with its own preprocessing, checked before it is loaded."""

from __future__ import annotations

from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import CheckpointError
from rsplugins.models import architectures, checkpoint
from rsplugins.zoo import manifest as manifests
from rsplugins.zoo import store


def load(reference: str) -> Classifier:
    """Load a model of the zoo.

    Args:
        reference: its id, such as ``"digits-cnn.digits-gaussian025-v1"``.

    Raises:
        UnknownNameError: no such model; with a did-you-mean.
        CheckpointError: it has no weights (and why), or they are not those of the manifest.
    """
    folder = store.find(reference)
    manifest = manifests.read(folder)
    if not manifest.weights:
        raise CheckpointError(f"zoo:{reference} has no weights: {manifest.no_weights}", fix="Train it with its recipe.")
    state: checkpoint.State = {}
    for weights in manifest.weights:
        path = folder / weights.file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", fix=f"Run `rsplugins zoo fetch {reference}`.")
        if path.stat().st_size != weights.bytes or checkpoint.sha256(path) != weights.sha256:
            checkpoint.read(path)  # says when it is an HTML page or an LFS pointer
            raise CheckpointError(
                f"{path} is not the file of its manifest: its sha256 differs.",
                cause="a damaged download, or weights that were changed without the manifest.",
                fix=f"Delete it and run `rsplugins zoo fetch {reference}`.",
            )
        state |= checkpoint.read(path)
    network = architectures.build(
        manifest.architecture.name, num_classes=manifest.architecture.num_classes, **manifest.architecture.arguments
    )
    checkpoint.fit(network, state, f"zoo:{reference}")
    spec = manifest.input
    return wrap(
        network,
        mean=spec.mean,
        std=spec.std,
        input_size=spec.shape,
        num_classes=manifest.architecture.num_classes,
        resize=spec.resize,
        source=f"zoo:{reference}",
    )
