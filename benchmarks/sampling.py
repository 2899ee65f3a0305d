"""What randomised smoothing costs with default settings, beside a bare forward pass and a plain loop, in turns.

    uv run python benchmarks/sampling.py [--threads 2] [--rounds 5] [--changed] [--peers]

* engine: ``gaussian`` with default settings on 4 images, n = 1,000, over the best bare forward (batch 8 to 512, both layouts);
  with ``--changed`` also under bfloat16 autocast, and compiled: other functions, and recorded as such;
* one image a call, n = 2,000: ``rsplugins.certify`` against a plain loop of Cohen et al. at its best batch, and with ``--peers``
  against ART (``pip install adversarial-robustness-toolbox statsmodels``) at its best batch;
* first call: the same call in a fresh process, with and without what an earlier process kept.

Medians of rounds that alternate; ratios above 1 mean that this package is faster.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

import rsplugins
from rsplugins.models import architectures
from rsplugins.provenance import processor

TRAINED = "resnet18.cifar10-jpeg-gaussian025-small-v1"
SIZES = (8, 16, 32, 64, 128, 256, 512)
CHILD = """
import sys, time, torch, rsplugins
sys.path.insert(0, {here!r})
import sampling
torch.set_num_threads({threads})
classifier, images = sampling.subject()
begun = time.perf_counter()
rsplugins.certify(classifier, images[:1], "gaussian", sigma=0.25, n0=100, n=2000)
print(time.perf_counter() - begun)
"""


def subject() -> tuple[rsplugins.Classifier, torch.Tensor]:
    """Return a ResNet-20 with random weights, and four images."""
    torch.manual_seed(0)
    network = architectures.build("resnet20", num_classes=10)
    classifier = rsplugins.wrap(network, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=(3, 32, 32), num_classes=10)
    return classifier, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seconds(work: Callable[[], object]) -> float:
    """Run something once."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def bare(classifier: rsplugins.Classifier, samples: int) -> tuple[Callable[[], None], str]:
    """Return a loop of bare forward passes over so many samples, at the best of all sizes and layouts."""
    best = (float("inf"), 0, torch.contiguous_format)
    for layout in (torch.contiguous_format, torch.channels_last):
        for size in SIZES:
            batch = torch.rand(size, 3, 32, 32).contiguous(memory_format=layout)
            with torch.inference_mode():
                classifier(batch)
                cost = statistics.median(seconds(functools.partial(classifier, batch)) for _ in range(3)) / size
            best = min(best, (cost, size, layout), key=lambda entry: entry[0])
    _, size, layout = best
    batch = torch.rand(size, 3, 32, 32).contiguous(memory_format=layout)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(samples // size):
            classifier(batch)
        if samples % size:
            classifier(batch[: samples % size])

    return run, f"batch {size}, {str(layout).removeprefix('torch.')}"


def cohen(classifier: rsplugins.Classifier, image: torch.Tensor, n0: int, n: int, size: int) -> Callable[[], np.ndarray]:
    """Return the sampling loop of Cohen et al. (2019), core.py, written anew: noise, forward, argmax, count."""

    @torch.no_grad()
    def count(number: int) -> np.ndarray:
        counts = np.zeros(10, dtype=int)
        while number > 0:
            rows = min(size, number)
            number -= rows
            batch = image.repeat((rows, 1, 1, 1))
            predictions = classifier(batch + 0.25 * torch.randn_like(batch)).argmax(1)
            counts += np.bincount(predictions.numpy(), minlength=10)
        return counts

    return lambda: count(n0) + count(n)


def art(classifier: rsplugins.Classifier, image: torch.Tensor, n0: int, n: int, size: int) -> Callable[[], object]:
    """Return one certification by the Adversarial Robustness Toolbox."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=classifier, loss=torch.nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, sample_size=n0, scale=0.25,
        clip_values=(0.0, 1.0), channels_first=True, device_type="cpu",
    )  # fmt: skip
    return lambda: smoothed.certify(image[None].numpy(), n=n, batch_size=size)


def best_size(make: Callable[[int], Callable[[], object]]) -> int:
    """Return the batch at which a peer is fastest."""
    found = {}
    for size in SIZES[2:]:
        work = make(size)
        work()
        found[size] = min(seconds(work) for _ in range(2))
    return min(found, key=found.__getitem__)


def in_turns(rounds: int, **works: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each, run in turns after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            cost = seconds(work)
            if number:
                times[name].append(cost)
    return {name: statistics.median(costs) for name, costs in times.items()}


def changed(classifier: rsplugins.Classifier, images: torch.Tensor, n: int, rounds: int, name: str) -> None:
    """Print the speed of functions that are not the model as it is, over the best bare forward of the model as it is."""
    limit, said = bare(classifier, len(images) * (n + 100))
    settings = {"sigma": 0.25, "n0": 100, "n": n}
    options: dict[str, dict[str, object]] = {"as it is": {}, "bfloat16": {"dtype": "bfloat16"}, "compile": {"compile": True}}
    works = {how: functools.partial(rsplugins.certify, classifier, images, "gaussian", **settings, **more)
             for how, more in options.items()}  # fmt: skip
    found = in_turns(rounds, bare=limit, **works)
    ratios = ", ".join(f"{how} {found['bare'] / found[how]:.3f}" for how in works)
    print(f"engine over the best bare forward ({said}), {name}, n = {n:,}: {ratios}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--changed", action="store_true", help="also with bfloat16 and with torch.compile")
    parser.add_argument("--peers", action="store_true", help="also against ART, which has to be installed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}")
    classifier, images = subject()

    settings = {"sigma": 0.25, "n0": 100, "n": 1000}
    limit, said = bare(classifier, 4 * 1100)
    found = in_turns(options.rounds, bare=limit, engine=lambda: rsplugins.certify(classifier, images, "gaussian", **settings))
    print(f"engine over the best bare forward ({said}): {found['bare'] / found['engine']:.3f}")
    print(f"  4 images, n0 = 100, n = 1,000: bare {found['bare']:.3f} s, engine {found['engine']:.3f} s")
    if options.changed:
        changed(classifier, images, 1000, options.rounds, "the same network")
        # Of random weights a third of the samples are near-ties in 16 bits, of trained ones a few in a hundred.
        changed(rsplugins.load(f"zoo:{TRAINED}"), images, 4000, options.rounds, TRAINED)

    size = best_size(lambda rows: cohen(classifier, images[0], 100, 2000, rows))
    ours = {"sigma": 0.25, "n0": 100, "n": 2000}
    works: dict[str, Callable[[], object]] = {"loop": cohen(classifier, images[0], 100, 2000, size)}
    if options.peers:
        best = best_size(lambda rows: art(classifier, images[0], 100, 2000, rows))
        works["ART"] = art(classifier, images[0], 100, 2000, best)
    works["ours"] = lambda: rsplugins.certify(classifier, images[:1], "gaussian", **ours)
    found = in_turns(options.rounds, **works)
    for name in works:
        if name != "ours":
            print(f"one image a call over {name}: {found[name] / found['ours']:.3f} times as fast")
    print("  one image, n0 = 100, n = 2,000: " + ", ".join(f"{name} {cost:.3f} s" for name, cost in found.items()))

    with tempfile.TemporaryDirectory() as cache:
        code = CHILD.format(here=os.path.dirname(os.path.abspath(__file__)), threads=options.threads)  # noqa: PTH100, PTH120
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        command = [sys.executable, "-c", code]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
    first, second = (float(run.stdout) for run in runs)
    print(f"first call of a process, one image: {first:.2f} s the first time on a machine, {second:.2f} s afterwards")


if __name__ == "__main__":
    main()
