"""Print the tables of docs/methods/training.md from the zoo's manifests, whose numbers `rsplugins zoo verify` recomputes.

python zoo/tables.py [ZOO]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rsplugins.zoo.manifest import Manifest, read

Column = tuple[str, Callable[[Manifest], str]]

ATTACKED = [f"mnist-cnn.mnist-{method}-v1" for method in ("at", "gairat", "mail-at")]
SMOOTHED = [f"mnist-cnn.mnist-{method}050-v2" for method in ("gaussian", "macer", "covariance")]
BOUNDED = [f"mnist-small.mnist-{method}{eps}-v2" for eps in ("010", "030") for method in ("ibp", "sound-etb", "etb")]


def value(metric: str, certifier: str = "", radius: float | None = None) -> Callable[[Manifest], str]:
    """Return the reader of a number: a share in per cent, or a radius, rounded down."""

    def read_value(manifest: Manifest) -> str:
        for result in manifest.results:
            named = not certifier or f"{result.certifier} ".startswith(f"{certifier} ")
            if result.metric == metric and named and radius in (None, result.radius):
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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    zoo = parser.parse_args().zoo
    clean: Column = ("clean %", value("accuracy"))
    cost: Column = ("minutes for epochs", minutes)
    pgd: Column = ("PGD-20 %", value("accuracy_under_attack", "PGD-20"))
    margin: Column = ("PGD-20 on the margin %", value("accuracy_under_attack", "PGD-20 on the margin"))
    auto: Column = ("AutoAttack %", value("accuracy_under_attack", "AutoAttack"))
    radii: list[Column] = [(f"r = {r:g}", value("certified_accuracy", "gaussian", r)) for r in (0, 0.5, 1.0, 1.5)]
    certified: list[Column] = [
        (f"{name} %", value("certified_accuracy", name)) for name in ("crown-ibp", "ibp", "sound-etb", "crown")
    ]
    print(table(zoo, ATTACKED, [clean, pgd, margin, auto, cost]), end="\n\n")  # noqa: T201
    print(table(zoo, SMOOTHED, [clean, ("ACR", value("acr", "gaussian")), *radii, cost]), end="\n\n")  # noqa: T201
    print(table(zoo, BOUNDED, [clean, pgd, *certified, cost]))  # noqa: T201


if __name__ == "__main__":
    main()
