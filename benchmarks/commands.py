"""What a user waits for at the command line: re-scoring finished runs, claims from votes, and the list of plugins.

    uv run python benchmarks/commands.py [--inputs 1000 10000] [--rounds 5] [--large 50000]

Every command runs in fresh processes, start of Python included; medians. ``plugins list`` stands beside its peer, the help of an
empty typer program, in turns. The runs that are re-scored are real ones, of a small linear model on random images. With
``--large``, a run of so many inputs and 1,000 classes is made (minutes), and the largest memory of each command printed. Python
may write its bytecode, as it does where nothing forbids it.
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

import numpy as np
import torch

import rsplugins
from rsplugins.certification import prepare
from rsplugins.certifier import Execution
from rsplugins.data import Dataset
from rsplugins.host import get_host
from rsplugins.runs.execute import execute
from rsplugins.statistics.claims import gaussian

PEER = "import sys, typer; app = typer.Typer(); app.command()(lambda: None); sys.argv[1:] = ['--help']; app()"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
PROGRAM = [sys.executable, "-c", "from rsplugins.cli import main; main()"]


def processor() -> str:
    """Return the processor's name, and the kernels that torch picks for it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores, kernels {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def make_run(inputs: int, directory: Path, classes: int = 10, sigma: float = 0.05) -> None:
    """Certify random images by votes into a run directory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(inputs, 1, 4, 4, generator=generator)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes))
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4), source="random linear model")
    data = Dataset(name="random", split="test", labels=[0] * inputs, read=lambda index: images[index], num_classes=classes)
    method = get_host().find("certifier", "gaussian")
    certifier = prepare(method, classifier, {"sigma": sigma, "n0": 10, "n": 100}, Execution(batch_size=128))
    execute(method, certifier, data, range(inputs), directory)


def seconds(*command: str) -> float:
    """Run a command in a process of its own."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def memory(*command: str) -> float:
    """Return the largest memory of a command, in MB."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    out = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return float(out.stdout)


def claims_a_second(count: int = 2000) -> dict[str, float]:
    """Return how many claims are read out of votes in a second of one process, by kind."""
    votes = [int(k) for k in np.random.default_rng(0).integers(5_000, 10_000, count)]
    parameters = {"sigma": 0.5, "n0": 100, "n": 10_000, "alpha": 0.001, "bound": "clopper-pearson"}
    found = {}
    for name, extra in (("fixed n", {"stop_at": []}), ("--stop-at .5", {"stop_at": [0.5]})):
        start = time.process_time()
        for k in votes:
            gaussian({"selection": {"3": 100}, "estimation": {"3": k, "5": 10_000 - k}}, parameters | extra)
        found[name] = count / (time.process_time() - start)
    return found


def show(name: str, times: list[float]) -> None:
    """Print a median and its range."""
    print(f"{name:<32} median {statistics.median(times):6.2f} s, {min(times):.2f} to {max(times):.2f}")


def main() -> None:
    """Measure and print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=0, help="inputs of a run whose commands' memory is measured")
    arguments = parser.parse_args()
    print(processor())
    listing, peer = [], []
    for _ in range(arguments.rounds):
        listing.append(seconds(*PROGRAM, "plugins", "list"))
        peer.append(seconds(sys.executable, "-c", PEER))
    show("plugins list", listing)
    show("help of an empty typer program", peer)
    for kind, rate in claims_a_second().items():
        print(f"{'claims, ' + kind:<32} {rate:,.0f} a second")
    for inputs in arguments.inputs:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            make_run(inputs, directory)
            command = [*PROGRAM, "rescore", str(directory), "--alpha", "0.01"]
            show(f"rescore, {inputs:,} inputs", [seconds(*command) for _ in range(arguments.rounds)])
    if arguments.large:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            make_run(arguments.large, directory, classes=1000, sigma=1.0)
            size = (directory / "records.jsonl").stat().st_size / 1e6
            for words in (["report"], ["verify"], ["rescore", "--alpha", "0.01"], ["compare", str(directory)]):
                large = memory(*PROGRAM, words[0], str(directory), *words[1:])
                print(f"{words[0]}, {arguments.large:,} inputs x 1,000 classes ({size:.0f} MB of records): {large:.0f} MB")


if __name__ == "__main__":
    main()
