"""Fewer samples, the same guarantee: ``covariance-guided`` against ``gaussian`` on real digits, as shown in docs/covariance.md.

    python docs/scripts/covariance_guided.py --images 560

Trains a small network with noise on scikit-learn's digits, then certifies images that it was not trained on with both.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.data import load

SIGMA, HELD_OUT = 0.25, 200


def train(images: torch.Tensor, labels: torch.Tensor, steps: int = 3000) -> nn.Module:
    """Train an MLP on noisy digits; the learning rate falls linearly to zero."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(steps):
        chosen = torch.randint(len(images), (128,))
        noisy = images[chosen] + SIGMA * torch.randn(128, 1, 8, 8)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(network((noisy - 0.3) / 0.37), labels[chosen]).backward()
        optimizer.step()
    return network


def main() -> None:
    """Print radii, samples and seconds of both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=560)
    parser.add_argument("--n", type=int, default=100_000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    test, rest = load("digits", split="test"), load("digits", split="train")
    pairs = [rest[index] for index in range(len(rest))]
    used = pairs[:-HELD_OUT]
    network = train(torch.stack([image for image, _ in used]), torch.tensor([label for _, label in used]))
    classifier = rsplugins.wrap(network, mean=0.3, std=0.37, input_size=(1, 8, 8), num_classes=10)
    fresh = ([test[index] for index in range(len(test))] + pairs[-HELD_OUT:])[: arguments.images]
    images, labels = torch.stack([image for image, _ in fresh]), [label for _, label in fresh]
    for method in ("gaussian", "covariance-guided"):
        found = rsplugins.certify(classifier, images, method, sigma=SIGMA, n=arguments.n, progress=True)
        count = len(found)
        right = sum(c.prediction == label for c, label in zip(found, labels, strict=True)) / count
        samples = sum(c.samples for c in found) / count
        print(
            f"{method}: mean radius {sum(c.radius for c in found) / count:.4f}, samples {samples:,.0f}, "
            f"right {right:.3f}, "
            f"abstained {sum(c.abstained for c in found)}, seconds {sum(c.seconds for c in found) / count:.2f} an image"
        )


if __name__ == "__main__":
    main()
