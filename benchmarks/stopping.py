"""How many samples ``--stop-at`` saves: a grid of radii decided in one run, beside the zoo's records at n = 100,000.

    uv run python benchmarks/stopping.py --data-root DIR [--inputs 100] [--models ID ...]

The radii are the quarters of sigma up to 2 sigma. Printed are the samples an input in both runs, their ratio, and by how much the
certified accuracy at each radius is below that of the fixed number of samples, in points: a confidence sequence, which may be
looked at while it grows, is a little weaker than the bound for a number that was fixed before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import rsplugins

MODELS = ("mnist-cnn.mnist-gaussian025-v1", "resnet18.cifar10-jpeg-gaussian025-small-v1")
ZOO = Path(__file__).parent.parent / "zoo"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to keep the runs; the same command goes on there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        fixed = rsplugins.open_run(ZOO / name / "records" / "gaussian-n100000")
        sigma, n = fixed.manifest.parameters["sigma"], fixed.manifest.parameters["n"]
        radii = tuple(round(k * sigma / 4, 6) for k in range(1, 9))
        rows = fixed.rows[:: max(1, len(fixed.rows) // options.inputs)][: options.inputs]
        classifier = rsplugins.load(f"zoo:{name}")
        data = rsplugins.load_data(fixed.manifest.data["reference"], root=options.data_root, input_size=classifier.input_size)
        out = (options.out or Path(tempfile.mkdtemp())) / name
        settings = {"sigma": sigma, "n": n, "alpha": fixed.manifest.parameters["alpha"], "stop_at": radii}
        indices = [row.index for row in rows]
        run = rsplugins.certify(
            classifier, data, "gaussian", indices=indices, seed=1, out=out, dtype=fixed.manifest.dtype, **settings
        )
        before = sum(row.record.samples for row in rows) / len(rows)
        after = sum(row.record.samples for row in run.rows) / len(rows)
        print(f"{name}: sigma {sigma:g}, {len(rows)} inputs: {before:,.0f} samples an input, with --stop-at {after:,.0f}: "
              f"{before / after:.1f} times fewer")  # fmt: skip
        for radius in radii:
            kept, won = (
                100 * sum(row.correct and row.radius >= radius for row in those) / len(rows) for those in (rows, run.rows)
            )
            print(f"  certified at {radius:g}: {kept:.1f} %, with --stop-at {won:.1f} %: {kept - won:+.1f} points lost")


if __name__ == "__main__":
    main()
