"""What a denoiser does to a model that never saw noise: the tables of docs/methods/denoised.md.

    python docs/scripts/denoised.py noise --model zoo:ID --denoiser zoo:ID --data folder:photographs --data-root DIR
    python docs/scripts/denoised.py cost --model zoo:ID --denoiser zoo:ID
    python docs/scripts/denoised.py curves RUN [RUN ...] --labels LABEL [LABEL ...] --out docs/denoised-imagenet.png

``noise``: accuracy of the model on one noisy copy of each image, alone and behind the denoiser. ``cost``: multiplications and
images a second, in turn. ``curves``: certified accuracy of runs that `rsplugins certify` made, in one picture.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import rsplugins
from rsplugins.runs.plots import curve_figure

SIGMAS = (0.12, 0.25, 0.5)


def noise(arguments: argparse.Namespace) -> None:
    """Print accuracy under noise by sigma."""
    classifier = rsplugins.load(arguments.model)
    data = rsplugins.load_data(arguments.data, root=arguments.data_root, input_size=classifier.input_size)
    chosen = range(0, len(data), arguments.stride)
    print("| sigma | alone | behind the denoiser | inputs |\n| --- | ---: | ---: | ---: |")
    for sigma in (0.0, *arguments.sigmas):
        behind = rsplugins.denoise(classifier, arguments.denoiser, sigma=max(sigma, 1e-3))
        right = [0, 0]
        for index in chosen:
            image, label = data[index]
            # one draw an image, the same for both
            drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(index))
            noisy = (image + sigma * drawn)[None]
            with torch.inference_mode():
                for position, model in enumerate((classifier, behind)):
                    right[position] += int(model(noisy).argmax()) == label
        cells = [f"{100 * count / len(chosen):.1f} % ± {_half(count, len(chosen)):.1f}" for count in right]
        print(f"| {sigma:g} | {' | '.join(cells)} | {len(chosen)} |", flush=True)


def _half(count: int, total: int) -> float:
    """Half of the 95 % interval, in points."""
    share = count / total
    return 196 * math.sqrt(share * (1 - share) / total)


def cost(arguments: argparse.Namespace) -> None:
    """Print GMAC of an image and images a second, medians of interleaved rounds."""
    classifier = rsplugins.load(arguments.model)
    behind = rsplugins.denoise(classifier, arguments.denoiser, sigma=0.25)
    x = torch.rand(arguments.batch, *classifier.input_size).to(memory_format=torch.channels_last)
    models = {"the classifier alone": classifier, "behind the denoiser": behind}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model(x)
                times[name].append(time.perf_counter() - began)
    print("| | GMAC | parameters | images/s |\n| --- | ---: | ---: | ---: |")
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x[:1])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        speed = arguments.batch / statistics.median(times[name][1:])
        print(f"| {name} | {counter.get_total_flops() / 2e9:.3f} | {parameters / 1e6:.2f} M | {speed:.1f} |")
    print(f"\n{torch.get_num_threads()} threads, batch {arguments.batch}, median of {arguments.rounds} rounds in turn")


def curves(arguments: argparse.Namespace) -> None:
    """Draw certified accuracy against the radius."""
    runs = [rsplugins.open_run(path) for path in arguments.runs]
    figure = curve_figure(runs, arguments.labels or [path.name for path in arguments.runs])
    figure.savefig(arguments.out, dpi=120)
    sys.stdout.write(f"{arguments.out}\n")


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (noise, cost):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        command.add_argument("--model", required=True)
        command.add_argument("--denoiser", required=True)
    measured = commands.choices["noise"]
    measured.add_argument("--data", required=True)
    measured.add_argument("--data-root", type=Path)
    measured.add_argument("--stride", type=int, default=1)
    measured.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS))
    priced = commands.choices["cost"]
    priced.add_argument("--batch", type=int, default=16)
    priced.add_argument("--rounds", type=int, default=7)
    drawn = commands.add_parser("curves")
    drawn.set_defaults(run=curves)
    drawn.add_argument("runs", type=Path, nargs="+")
    drawn.add_argument("--labels", nargs="+")
    drawn.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
