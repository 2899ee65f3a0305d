"""Seconds that ``rsplugins rescore`` takes on finished runs: fresh processes, median of a few rounds.

    uv run python benchmarks/rescore.py [--inputs 1000 10000] [--rounds 3]

The runs are real ones, of a small linear model on random images; only re-scoring them is timed, start of Python included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import rsplugins
from rsplugins.certification import prepare
from rsplugins.certifier import Execution
from rsplugins.data import Dataset
from rsplugins.host import get_host
from rsplugins.runs.execute import execute

PROGRAM = [sys.executable, "-c", "from rsplugins.cli import main; main()"]


def processor() -> str:
    """Return the processor's name, and the kernels that torch picks for it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores, kernels {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def make_run(inputs: int, directory: Path) -> None:
    """Certify random images by votes into a run directory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(inputs, 1, 4, 4, generator=generator)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4), source="random linear model")
    data = Dataset(name="random", split="test", labels=[0] * inputs, read=lambda index: images[index], num_classes=10)
    method = get_host().find("certifier", "gaussian")
    certifier = prepare(method, classifier, {"sigma": 0.05, "n0": 10, "n": 100}, Execution(batch_size=128))
    execute(method, certifier, data, range(inputs), directory)


def seconds(directory: Path) -> float:
    """Re-score a run in a process of its own."""
    start = time.perf_counter()
    subprocess.run([*PROGRAM, "rescore", str(directory), "--alpha", "0.01"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(processor())
    for inputs in arguments.inputs:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            make_run(inputs, directory)
            times = [seconds(directory) for _ in range(arguments.rounds)]
        print(f"rescore {inputs:>6} inputs: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f}")


if __name__ == "__main__":
    main()
