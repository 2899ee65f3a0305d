"""Print the tables of docs/methods/training.md from the zoo's manifests, whose numbers `rsplugins zoo verify` recomputes.

python zoo/tables.py [ZOO]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rsplugins.models.manifest import Manifest, read

Column = tuple[str, Callable[[Manifest], str]]

MNIST_ATTACKED = [f"mnist-cnn.mnist-{method}-v1" for method in ("at", "gairat", "mail-at")]
MNIST_SMOOTHED = [f"mnist-cnn.mnist-{method}050-v2" for method in ("gaussian", "macer", "covariance")]
MNIST_BOUNDED = [f"mnist-small.mnist-{method}{eps}-v2" for eps in ("010", "030") for method in ("ibp", "sound-etb", "etb")]
CIFAR_ATTACKED = [
    *(f"cifar-small.cifar10-jpeg-{method}-v1" for method in ("at", "gairat", "mail-at", "gair-trades")),
    "fast-cifar.cifar10-jpeg-trades-v1",
]
CIFAR_LARGE = [f"fast-cifar.cifar10-jpeg-consistency{sigma}-v1" for sigma in ("025", "050", "100")]
CIFAR_SMOOTHED = [
    *CIFAR_LARGE,
    *(f"resnet18.cifar10-jpeg-{method}-small-v1" for method in ("gaussian025", "gaussian050", "gaussian100", "consistency050")),
    *(f"cifar-small.cifar10-jpeg-covariance{sigma}-v1" for sigma in ("025", "050")),
]
MNIST_LARGE = [f"mnist-cnn.mnist-consistency{sigma}-v1" for sigma in ("025", "050", "100")]
MORE_SAMPLES = [
    *(f"mnist-cnn.mnist-{name}" for name in ("gaussian025-v1", "gaussian050-v2", "gaussian100-v1", "macer050-v2")),
    *MNIST_LARGE,
    *CIFAR_LARGE,
    *(f"resnet18.cifar10-jpeg-{name}-small-v1" for name in ("gaussian025", "consistency050")),
]
FEW, MANY = 10_000, 100_000
"""Samples an input: numbers of one table are of one of the two."""
CIFAR_BOUNDED = [
    f"cifar-small.cifar10-jpeg-{name}" for name in ("sound-etb2-255-v1", "etb2-255-v1", "sound-etb8-255-v2", "etb8-255-v1")
]


def value(metric: str, certifier: str = "", radius: float | None = None, n: int = FEW) -> Callable[[Manifest], str]:
    """Return the reader of a number: a share in per cent, or a radius, rounded down; of smoothing with n samples an input."""

    def read_value(manifest: Manifest) -> str:
        for result in manifest.results:
            named = not certifier or f"{result.certifier} ".startswith(f"{certifier} ")
            if result.metric == metric and named and radius in (None, result.radius) and result.n in (None, n):
                digits, scale = (1, 100.0) if "accuracy" in metric else (3, 1.0)
                return f"{math.floor(result.value * scale * 10**digits + 1e-9) / 10**digits:.{digits}f}"
        return ""

    return read_value


def minutes(manifest: Manifest) -> str:
    """Return how long the training took."""
    training = manifest.training
    return "" if training is None else f"{training.minutes:.1f} for {training.epochs}"


def table(zoo: Path, names: Sequence[str], columns: Sequence[Column]) -> str:
    """Return a table in Markdown of the models that the zoo has."""
    found = [read(zoo / name / "manifest.toml") for name in names if (zoo / name / "manifest.toml").is_file()]
    lines = ["| model | " + " | ".join(title for title, _ in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| `{manifest.id}` | " + " | ".join(shown(manifest) for _, shown in columns) + " |" for manifest in found]
    return "\n".join(lines)


def inputs(n: int) -> Callable[[Manifest], str]:
    """Return the reader of how many inputs were certified by smoothing with n samples each."""
    return lambda manifest: next(
        (str(result.images) for result in manifest.results if (result.metric, result.n) == ("acr", n)), ""
    )


def attacked_inputs(manifest: Manifest) -> str:
    """Return how many inputs were attacked."""
    return next((str(result.images) for result in manifest.results if result.metric == "accuracy_under_attack"), "")


def trained_on(manifest: Manifest) -> str:
    """Return the device of the training."""
    return "" if manifest.training is None else manifest.training.device.replace("cpu", "CPU")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    zoo = parser.parse_args().zoo
    clean: Column = ("clean %", value("accuracy"))
    cost: Column = ("minutes for epochs", minutes)
    device: Column = ("trained on", trained_on)
    pgd: Column = ("PGD-20 %", value("accuracy_under_attack", "PGD-20"))
    attacked: list[Column] = [
        clean,
        pgd,
        ("PGD-20 on the margin %", value("accuracy_under_attack", "PGD-20 on the margin")),
        ("AutoAttack %", value("accuracy_under_attack", "AutoAttack")),
        ("inputs", attacked_inputs),
        cost,
        device,
    ]

    def smoothed(*radii: float, n: int = FEW) -> list[Column]:
        acr: Column = ("ACR", value("acr", "gaussian", n=n))
        return [
            clean,
            acr,
            *((f"r = {r:g}", value("certified_accuracy", "gaussian", r, n)) for r in radii),
            ("inputs", inputs(n)),
        ]

    def bounded(*methods: str) -> list[Column]:
        return [clean, pgd, *((f"{name} %", value("certified_accuracy", name)) for name in methods), cost]

    for names, columns in (
        (MNIST_ATTACKED, attacked),
        (MNIST_SMOOTHED, [*smoothed(0, 0.5, 1.0, 1.5), cost]),
        (MNIST_BOUNDED, bounded("crown-ibp", "ibp", "sound-etb", "crown")),
        (CIFAR_ATTACKED, attacked),
        (CIFAR_SMOOTHED, [*smoothed(0, 0.25, 0.5, 1.0), cost, device]),
        (CIFAR_BOUNDED, bounded("crown-ibp", "ibp", "sound-etb")),
        (MORE_SAMPLES, [*smoothed(0, 0.5, 1.0, 2.0, n=MANY), cost, device]),
    ):
        print(table(zoo, names, columns), end="\n\n")  # noqa: T201


if __name__ == "__main__":
    main()
