"""Latent-space against input-space smoothing: certified accuracy, ACR and seconds an input at equal n, and the speed-up.

Two networks of one architecture (an orthogonal encoder and a head) are trained for a few epochs, one with noise on the image, one
with noise on the latent; each is certified with the smoothing it was trained for. The speed-up is measured in this run, on one
network with equal n, and compared with N / (e + N (1 - e)), where e is the encoder's share of a bare forward pass.

    python docs/scripts/latent_smoothing.py mnist --data-root DATA
    python docs/scripts/latent_smoothing.py cifar10 --data folder:CIFAR/test --train folder:CIFAR/train

or, with networks that are trained already (any two that can be cut at `encoder`), without training:

    python docs/scripts/latent_smoothing.py cifar10 --data folder:CIFAR/test --models zoo:INPUT-NOISE zoo:LATENT-NOISE

Training needs `pip install 'rsplugins[orthogonal]'`. A few minutes on a CPU; the numbers are those of small networks.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rsplugins
from rsplugins.data import load
from rsplugins.lipschitz import orthogonal_network, plain, split_at

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def stacked(reference: str, split: str, root: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` images and labels, evenly spread over a data set."""
    data = load(reference, root=root, split=split)
    chosen = range(0, len(data), max(1, len(data) // count))[:count]
    pairs = [data[i] for i in chosen]
    return torch.stack([torch.as_tensor(image) for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


def train(size: str, images: Tensor, labels: Tensor, *, where: str, sigma: float, epochs: int, width: int) -> nn.Module:
    """Train a network with Gaussian noise on the ``"input"`` or on the ``"latent"``; returns it with its weights fixed."""
    torch.manual_seed(0)
    network = orthogonal_network(size, width=width, num_classes=10)
    batches = len(images) // 128
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        order, correct = torch.randperm(len(images)), 0
        for step in range(batches):
            rows = order[step * 128 : (step + 1) * 128]
            x, y = images[rows], labels[rows]
            noisy = x + sigma * torch.randn_like(x) if where == "input" else x
            latent = network.encoder(noisy)
            latent = latent + sigma * torch.randn_like(latent) if where == "latent" else latent
            logits = network.head(latent)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == y).sum())
        print(
            f"  {where} noise, epoch {epoch + 1}/{epochs}: {correct / (batches * 128):.1%} of noisy training images right",
            flush=True,
        )
    return plain(network)


def encoder_share(encoder: nn.Module, head: nn.Module, image: Tensor, batch: int, rounds: int = 7) -> float:
    """Return the encoder's share of a bare forward pass: medians of interleaved measurements at the engine's batch size."""
    x = image.expand(batch, *image.shape).contiguous()
    spent: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            z = encoder(x)
            middle = time.perf_counter()
            head(z)
            spent[0].append(middle - start)
            spent[1].append(time.perf_counter() - middle)
    first, second = (sorted(times)[len(times) // 2] for times in spent)
    return first / (first + second)


def row(name: str, certificates: list[rsplugins.Certificate], labels: Tensor) -> str:
    """Return a line of the table."""
    radii = [c.radius if c.prediction == int(y) else -1.0 for c, y in zip(certificates, labels, strict=True)]
    shares = " | ".join(f"{sum(r >= at for r in radii) / len(radii):.3f}" for at in RADII)
    acr = sum(max(0.0, r) for r in radii) / len(radii)
    seconds = sum(c.seconds for c in certificates) / len(certificates)
    return f"| {name} | {shares} | {acr:.3f} | {seconds:.4f} |"


def trained(options: argparse.Namespace, test: str, input_size: torch.Size) -> dict[str, rsplugins.Classifier]:
    """Train the two networks."""
    split = "test" if options.train else "train"  # a folder has no splits: it is one
    images, labels = stacked(options.train or test, split, options.data_root, options.train_images)
    made = {}
    for where in ("input", "latent"):
        network = train(
            options.size, images, labels, where=where, sigma=options.sigma, epochs=options.epochs, width=options.width
        )
        made[where] = rsplugins.wrap(network, input_size=input_size)
    return made


def main() -> None:
    """Train, certify and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("mnist", "cifar10"))
    parser.add_argument("--data", help="data reference of the test images; the size's own when left out")
    parser.add_argument("--train", help="data reference of the training images; that of --data when left out")
    parser.add_argument("--models", nargs=2, metavar=("INPUT", "LATENT"), help="trained with noise on the image, on the latent")
    parser.add_argument("--data-root")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    test = options.data or options.size
    x, y = stacked(test, "test", options.data_root, options.images)
    if options.models:
        made = dict(zip(("input", "latent"), map(rsplugins.load, options.models), strict=True))
    else:
        made = trained(options, test, x.shape[1:])
    settings = {"sigma": options.sigma, "n0": 100, "n": options.n, "alpha": 0.001, "batch_size": 256}
    latent = {"split": "encoder", "margin": False, **settings}
    rows = [
        row("gaussian (input noise)", rsplugins.certify(made["input"], x, "gaussian", **settings), y),
        row("latent (latent noise)", rsplugins.certify(made["latent"], x, "latent", **latent), y),
        row("lipschitz-margin (same network as latent)", rsplugins.certify(made["latent"], x, "lipschitz-margin"), y),
    ]
    print(f"\n{len(x)} images of {test}, sigma {options.sigma}, n {options.n}, alpha 0.001\n")
    print("| method | " + " | ".join(f"r={at:g}" for at in RADII) + " | ACR | s / input |")
    print("| --- |" + " --- |" * (len(RADII) + 2))
    print("\n".join(rows))

    few = x[: min(20, len(x))]
    took: dict[str, list[float]] = {"gaussian": [], "latent": []}
    for _ in range(3):
        for method, chosen in (("gaussian", settings), ("latent", latent)):
            done = rsplugins.certify(made["latent"], few, method, **chosen)
            took[method].append(sum(c.seconds for c in done) / len(done))
    measured = min(took["gaussian"]) / min(took["latent"])
    encoder, head = split_at(made["latent"], "encoder")
    share, samples = encoder_share(encoder, head, x[0], 256), options.n + 100
    predicted = samples / (share + samples * (1 - share))
    print(f"\nspeed-up at equal n on one network: {measured:.2f}x measured, {predicted:.2f}x from e = {share:.3f}, N = {samples}")


if __name__ == "__main__":
    main()
