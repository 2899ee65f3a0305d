"""Train the embedded default: a small network on scikit-learn's digits with Gaussian noise, sigma 0.25.

    python zoo/train_digits.py

writes zoo/digits-cnn.digits-gaussian025-v1/ (weights in float16, manifest with what was measured on the stored weights).
Seeded, one thread, about ten seconds on a CPU.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from rsplugins.data import digits
from rsplugins.models import checkpoint
from rsplugins.models.architectures import digits_cnn
from rsplugins.models.zoo import load
from rsplugins.zoo import DEFAULT_MODEL
from rsplugins.zoo import manifest as manifests

SIGMA, SEED, EPOCHS, BATCH, RATE = 0.25, 0, 300, 128, 2e-3
# Mean and standard deviation of the training pixels, rounded.
MEAN, STD = 0.305, 0.376


def train() -> torch.nn.Module:
    """Return the network after EPOCHS passes over the training split, each image with fresh noise."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    data = digits.load(split="train")
    images, labels = torch.stack([image for image, _ in data]), torch.as_tensor(data.labels)
    network = digits_cnn()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            noisy = images[batch] + SIGMA * torch.randn(images[batch].shape)
            loss = F.cross_entropy(network((noisy - MEAN) / STD), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def manifest(folder: Path, minutes: float, results: tuple[manifests.Result, ...] = ()) -> manifests.Manifest:
    """Return the manifest of the weights that lie in ``folder``."""
    weights = folder / "model.safetensors"
    return manifests.Manifest(
        id=DEFAULT_MODEL,
        summary="The embedded default: a small network for 8x8 digits, trained with Gaussian noise of sigma 0.25.",
        licences=manifests.Licences(
            code="Apache-2.0", weights="Apache-2.0", data="CC-BY-4.0 (UCI Optical Recognition of Digits)"
        ),
        input=manifests.InputSpec(shape=(1, 8, 8), mean=(MEAN,), std=(STD,)),
        architecture=manifests.Architecture(name="digits_cnn", num_classes=10),
        weights=(
            manifests.Weights(
                file=weights.name, sha256=checkpoint.sha256(weights), bytes=weights.stat().st_size, dtype="float16"
            ),
        ),
        training=manifests.Training(
            data="digits (train): scikit-learn's digits without every fifth image",
            recipe="zoo/train_digits.py",
            recipe_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            seed=SEED,
            device="cpu",
            minutes=round(minutes, 2),
            versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "scikit-learn")},
        ),
        results=results,
    )


def accuracy() -> manifests.Result:
    """Return the accuracy of the stored weights on the test split, without noise."""
    classifier, data = load(DEFAULT_MODEL), digits.load(split="test")
    with torch.no_grad():
        predicted = classifier(torch.stack([image for image, _ in data])).argmax(1)
    correct = int((predicted == torch.as_tensor(data.labels)).sum())
    return manifests.Result(
        metric="accuracy", value=round(correct / len(data), 6), data="digits", split="test", images=len(data), device="cpu"
    )


def main() -> None:
    """Train, store, measure what was stored, write the manifest."""
    folder = Path(__file__).resolve().parent / DEFAULT_MODEL
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    network = train()
    minutes = (time.perf_counter() - start) / 60
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"))
    (folder / "model.safetensors").chmod(0o644)
    path = folder / manifests.FILE
    path.write_text(manifests.dumps(manifest(folder, minutes)), encoding="utf-8")
    path.write_text(manifests.dumps(manifest(folder, minutes, (accuracy(),))), encoding="utf-8")
    sys.stdout.write(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
