"""ETB, sound ETB, IBP, CROWN-IBP and CROWN bounds of one model side by side, and a plot of their widths against depth.

    uv run python docs/scripts/bounds_side_by_side.py
    uv run python docs/scripts/bounds_side_by_side.py --model zoo:... --data digits --eps 0.01 --out bounds
    uv run python docs/scripts/bounds_side_by_side.py --table small medium large

Without --model the network is random: bounds differ most where nothing was trained for them. With --table it measures the
networks of docs/bounds.md at CIFAR-10 size instead and prints their rows. ETB is an estimate: "contained" says how often it held.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

import rsplugins
import rsplugins.data
from rsplugins.lirpa.etb import ETB, PASS_THROUGH, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.whole_network import whole_network_bounds

METHODS = {
    "IBP": (None, "ibp"),
    "ETB, blocks (estimate)": (ETB, "ibp"),
    "ETB, whole network (estimate)": (None, "whole"),
    "sound ETB, pass-through": (PASS_THROUGH, "ibp"),
    "sound ETB": (SOUND_ETB, "ibp"),
    "CROWN-IBP": (None, "crown-ibp"),
    "CROWN-IBP over sound ETB": (SOUND_ETB, "crown-ibp"),
    "CROWN": (None, "crown"),
}


def prepared(name: str, module: nn.Module, images: Tensor, eps: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """The computation of the logits' bounds by one method, the network traced already."""
    operators, method = METHODS[name]
    network = BoundNetwork(module, images, operators=operators)
    if method == "whole":
        return lambda: whole_network_bounds(network, images, eps)
    return lambda: network.bounds(images, eps, method=method)


def bounds(name: str, module: nn.Module, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the logits by one method."""
    with torch.no_grad():
        return prepared(name, module, images, eps)()


def found(module: nn.Module, images: Tensor, eps: float, count: int = 500) -> Tensor:
    """Logits (B, points, K) at corners of the box and at one signed gradient step for each class and direction."""
    corners = images.unsqueeze(1) + eps * (torch.randint(2, (len(images), count, *images.shape[1:])) * 2 - 1)
    points = [corners]
    for k in range(module(images[:1]).shape[1]):
        x = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(module(x)[:, k].sum(), x)
        points += [(images + eps * gradient.sign()).unsqueeze(1), (images - eps * gradient.sign()).unsqueeze(1)]
    with torch.no_grad():
        return torch.stack([module(p) for p in torch.cat(points, 1)])


def contained(logits: Tensor, low: Tensor, high: Tensor) -> float:
    """Share of outputs whose every value found lies inside its bounds; an upper bound of the true share."""
    slack = 1e-5 * (1 + logits.abs().max())
    inside = (logits >= low.unsqueeze(1) - slack) & (logits <= high.unsqueeze(1) + slack)
    return float(inside.all(1).double().mean())


def published(size: str) -> nn.Module:
    """The small, medium and large networks of the ETB code at 3x32x32, randomly initialised."""
    conv, relu = nn.Conv2d, nn.ReLU
    layers = {
        "small": [
            conv(3, 16, 4, 2),
            relu(),
            conv(16, 32, 4),
            relu(),
            nn.Flatten(),
            nn.Linear(4608, 100),
            relu(),
            nn.Linear(100, 10),
        ],
        "medium": [
            *(conv(3, 32, 3), relu(), conv(32, 32, 4, 2), relu(), conv(32, 64, 3), relu(), conv(64, 64, 4, 2), relu()),
            *(nn.Flatten(), nn.Linear(1600, 512), relu(), nn.Linear(512, 512), relu(), nn.Linear(512, 10)),
        ],
        "large": [
            *(conv(3, 64, 3, 1, 1), relu(), conv(64, 64, 3, 1, 1), relu(), conv(64, 128, 3, 2, 1), relu()),
            *(conv(128, 128, 3, 1, 1), relu(), conv(128, 128, 3, 1, 1), relu()),
            *(nn.Flatten(), nn.Linear(32768, 200), relu(), nn.Linear(200, 10)),
        ],
    }[size]
    return nn.Sequential(*layers).eval()


def measured(compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], float, float]:
    """Bounds, seconds, and by how many mebibytes torch's allocations peaked."""
    with torch.no_grad():
        compute()  # with what is done once a network: tracing, and checks of the bounds
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compute()
        start = time.perf_counter()
        result = compute()
        seconds = time.perf_counter() - start
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return result, seconds, peak / 2**20


def table(sizes: list[str], eps: float) -> None:
    """Print one markdown row a network and method."""
    print(f"| network | method | mean width | IBP / it | contained | seconds | MiB |   eps = {eps:.5f}, one image, one thread")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    torch.set_num_threads(1)
    for size in sizes:
        torch.manual_seed(0)
        module, image = published(size), torch.rand(1, 3, 32, 32)
        logits, widest = found(module, image, eps), 0.0
        for name in METHODS:
            if name == "CROWN" and size != "small":  # quadratic in the neurons of a layer
                continue
            (low, high), seconds, peak = measured(prepared(name, module, image, eps))
            width = float((high - low).mean())
            widest = widest or width
            share = contained(logits, low, high)
            print(
                f"| {size} | {name} | {width:.4g} | {widest / width:.3g} | {share:.0%} | {seconds:.2f} | {peak:.0f} |", flush=True
            )


def against_depth(eps: float, out: Path) -> None:
    """Plot mean widths of random networks of growing depth."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    depths, image = range(2, 9), torch.rand(1, 100)
    torch.manual_seed(0)
    widths: dict[str, list[float]] = {name: [] for name in METHODS}
    for depth in depths:
        layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(100, 100), nn.ReLU())]
        module = nn.Sequential(*layers, nn.Linear(100, 10)).eval()
        for name, series in widths.items():
            low, high = bounds(name, module, image, eps)
            series.append(float((high - low).mean()))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, series in widths.items():
        axes.semilogy(depths, series, marker="o", markersize=3, linestyle="--" if "estimate" in name else "-", label=name)
    axes.set(xlabel="linear layers (100 neurons each, random)", ylabel=f"mean width of the logits' bounds, eps = {eps:g}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "width_against_depth.png", dpi=150)


def main() -> None:
    """Read the options and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="scheme:reference; a random network by default")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--eps", type=float, default=1 / 255)
    parser.add_argument("--table", nargs="+", choices=("small", "medium", "large"))
    parser.add_argument("--out", type=Path, default=Path("runs/bounds"))
    options = parser.parse_args()
    if options.table:
        table(options.table, options.eps)
        return
    torch.manual_seed(0)
    if options.model:
        module: nn.Module = rsplugins.load(options.model)
        data = rsplugins.data.load(options.data)
        images = torch.stack([data[index][0] for index in range(options.images)])
    else:
        module = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
        ).eval()
        images = torch.rand(options.images, 1, 8, 8)
    logits = found(module, images, options.eps)
    print(f"{'method':32} {'lower of logit 0':>17} {'upper':>9} {'mean width':>11} {'contained':>10}")
    for name in METHODS:
        low, high = bounds(name, module, images, options.eps)
        share, width = contained(logits, low, high), float((high - low).mean())
        print(f"{name:32} {float(low[0, 0]):17.4f} {float(high[0, 0]):9.4f} {width:11.4f} {share:10.0%}")
    options.out.mkdir(parents=True, exist_ok=True)
    against_depth(options.eps, options.out)
    print(f"widths against depth: {options.out / 'width_against_depth.png'}")


if __name__ == "__main__":
    main()
