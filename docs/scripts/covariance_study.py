"""How good are propagated radii? Tables and a scatter plot against Monte Carlo, as shown in docs/covariance.md.

    python docs/scripts/covariance_study.py mnist-cnn --data mnist --root ../shared/data --images 60 --plot scatter.png
    python docs/scripts/covariance_study.py cifar-cnn --data folder:cifar10/test --train folder:cifar10/train
    python docs/scripts/covariance_study.py zoo:digits-cnn.digits-gaussian025-v2 --data digits

A name of a network below trains it first, with Gaussian noise (--minutes, weights are kept in --weights); anything else is a
model reference. Everything is seeded; times depend on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm, spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import rsplugins
from rsplugins.data import load as load_data
from rsplugins.moments import Channel, Full, LowRank, MomentNetwork
from rsplugins.moments.claims import estimated_radius
from rsplugins.moments.estimator import evidence_of
from rsplugins.moments.network import LogitGaussian


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _mnist_cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def _cifar_cnn() -> nn.Module:
    convolutions = [
        nn.Conv2d(3, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))


NETWORKS = {
    "mnist-mlp": (lambda: _mlp(784, 256, 128, 10), (1, 28, 28), 0.1307, 0.3081),
    "mnist-mlp4": (lambda: _mlp(784, 128, 128, 128, 128, 10), (1, 28, 28), 0.1307, 0.3081),
    "mnist-cnn": (_mnist_cnn, (1, 28, 28), 0.1307, 0.3081),
    "cifar-cnn": (_cifar_cnn, (3, 32, 32), 0.47, 0.25),
}

REPRESENTATIONS = {
    "full, exact": (lambda: Full("exact"), ("sampled",)),
    "full, first order": (lambda: Full("first-order"), ("sampled",)),
    "low-rank 16": (lambda: LowRank(16), ("sampled",)),
    "low-rank 64": (lambda: LowRank(64), ("sampled", "union", "pairwise", "as-published")),
    "low-rank 256": (lambda: LowRank(256), ("sampled",)),
    "channel": (lambda: Channel(), ("sampled",)),
    "channel, inflation .1": (lambda: Channel(0.1), ("sampled",)),
    "channel, sound": (lambda: Channel("sound"), ("sampled",)),
    "published": (lambda: Channel(0.1, published=True), ("as-published",)),
}


def train(network: nn.Module, mean: float, std: float, images: Tensor, labels: Tensor, sigma: float, minutes: float) -> None:
    """Train with Gaussian noise by Adam, the learning rate falling to zero over the time given."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    start = time.perf_counter()
    while (spent := (time.perf_counter() - start) / (60 * minutes)) < 1:
        chosen = torch.randint(len(images), (128,))
        x = images[chosen].float() / 255
        x = x + sigma * torch.randn_like(x)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - spent)
        optimizer.zero_grad()
        F.cross_entropy(network((x - mean) / std), labels[chosen]).backward()
        optimizer.step()


def get_classifier(arguments: argparse.Namespace) -> rsplugins.Classifier:
    """Load a model, or one of this file's networks, training it when there are no weights yet."""
    if arguments.model not in NETWORKS:
        return rsplugins.load(arguments.model)
    build, size, mean, std = NETWORKS[arguments.model]
    torch.manual_seed(0)
    network = build()
    path = Path(arguments.weights) / f"{arguments.model}.weights.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        data = load_data(arguments.train or arguments.data, root=arguments.root, split="train")
        pairs = [data[index] for index in range(len(data))]
        images = torch.stack([(image * 255).round().byte() for image, _ in pairs])
        train(network, mean, std, images, torch.tensor([label for _, label in pairs]), arguments.sigma, arguments.minutes)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    return rsplugins.wrap(network, mean=mean, std=std, input_size=size, num_classes=10)


@torch.no_grad()
def sample(classifier: rsplugins.Classifier, image: Tensor, sigma: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and standard deviation of the logits over n noisy copies, and the votes."""
    logits = []
    for begin in range(0, n, 1000):
        noisy = image + sigma * torch.randn(min(1000, n - begin), *image.shape)
        logits.append(classifier(noisy))
    found = torch.cat(logits).double()
    return found.mean(0), found.std(0), found.argmax(1).bincount(minlength=found.shape[1])


def main() -> None:
    """Print the tables and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--train", default="")
    parser.add_argument("--root")
    parser.add_argument("--weights", default="study")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--only", default="", help="representations whose name contains this")
    parser.add_argument("--skip", default="none", help="representations whose name contains this are left out")
    parser.add_argument("--plot", default="")
    arguments = parser.parse_args()
    sigma = arguments.sigma

    classifier = get_classifier(arguments)
    data = load_data(arguments.data, root=arguments.root, split="test")
    chosen = np.linspace(0, len(data) - 1, arguments.images).astype(int)
    images = torch.stack([data[int(index)][0] for index in chosen])
    torch.manual_seed(1)
    start = time.perf_counter()
    sampled = [sample(classifier, image, sigma, arguments.n) for image in images]
    per_sample = (time.perf_counter() - start) / len(images) / arguments.n
    votes = torch.stack([votes for _, _, votes in sampled]).numpy()
    share = votes.max(1) / arguments.n
    # radii are comparable where the class has a majority and the votes are not all but unanimous
    use = (share > 0.5) & (share < 1 - 20 / arguments.n)
    truth = sigma * norm.ppf(share)
    correct = np.mean([int(vote.argmax()) == int(data[int(index)][1]) for vote, index in zip(votes, chosen, strict=True)])
    print(f"{arguments.model}: {arguments.images} images, n = {arguments.n}, accuracy {correct:.2f}, {use.sum()} used")
    print(f"100,000 samples take {per_sample * 1e5:.2f} s an image")
    print(
        "| representation; rule | mean error / sd | sd ratio | its range | radius error | rank corr. | optimistic | ms | times |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    network = MomentNetwork(classifier, images[:1], dtype=torch.float64)
    shown = {name: made for name, made in REPRESENTATIONS.items() if arguments.only in name and arguments.skip not in name}
    radii = {}
    for name, (make, rules) in shown.items():
        start = time.perf_counter()
        with torch.no_grad():
            found = [network.propagate(image.unsqueeze(0), sigma, make()) for image in images]
        seconds = (time.perf_counter() - start) / len(images)
        evidence = [evidence_of(LogitGaussian(f.mean[0], f.covariance[0])) for f in found]
        shift = max(float(((f.mean[0] - m) / s).abs().max()) for f, (m, s, _) in zip(found, sampled, strict=True))
        ratio = torch.stack([f.covariance[0].diagonal().sqrt() / s for f, (_, s, _) in zip(found, sampled, strict=True)])
        for rule in rules:
            radius = np.array([estimated_radius(said, sigma, rule) for said in evidence])
            error = np.abs(radius - truth)[use].mean()
            rank = spearmanr(radius[use], truth[use]).statistic
            optimistic = (radius > truth)[use].mean()
            print(
                f"| {name}; {rule} | {shift:.3f} | {ratio.mean():.3f} | {ratio.min():.3f} to {ratio.max():.3f} | {error:.4f} "
                f"| {rank:.3f} | {optimistic:.0%} | {1000 * seconds:.1f} | {per_sample * 1e5 / seconds:,.0f} |",
                flush=True,
            )
            radii[f"{name}; {rule}"] = radius
    if arguments.plot:
        drawn = ("full, exact; sampled", "low-rank 64; sampled", "channel; sampled", "published; as-published")
        scatter(truth[use], {name: radii[name][use] for name in drawn if name in radii}, arguments.plot)


def scatter(truth: np.ndarray, radii: dict[str, np.ndarray], path: str) -> None:
    """Draw propagated against sampled radius."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    for name, radius in radii.items():
        axes.scatter(truth, radius, s=10, label=name)
    axes.plot([0, truth.max()], [0, truth.max()], color="grey", linewidth=0.8)
    axes.set_xlabel("sampled radius")
    axes.set_ylabel("propagated radius (estimate)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
