"""The table of Smooth-Reduce: plain, mean and max in each noise mode, at equal n and at equal numbers of forward passes.

    uv run python docs/scripts/smooth_reduce_table.py
    uv run python docs/scripts/smooth_reduce_table.py --model zoo:mnist-cnn.mnist-gaussian050-v2 --data mnist --sigma 0.5

Each method is an ordinary run directory under --out, so an interrupted table goes on where it stopped, and
``rsplugins verify OUT/*`` recomputes it from the votes.
"""

import argparse
from pathlib import Path
from typing import Any

import rsplugins
import rsplugins.data
from rsplugins.certification import prepare
from rsplugins.certifier import Execution
from rsplugins.host import get_host
from rsplugins.machine.progress import for_stream
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.runs.execute import execute
from rsplugins.runs.rows import Row
from rsplugins.runs.summary import average_radius, certified_count

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=f"zoo:{DEFAULT_MODEL}")
parser.add_argument("--data", default="digits")
parser.add_argument("--data-root")
parser.add_argument("--stride", type=int, default=1)
parser.add_argument("--sigma", type=float, default=0.25)
parser.add_argument("--n", type=int, default=1000)
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("runs/smooth-reduce-table"))
options = parser.parse_args()

classifier = rsplugins.load(options.model)
data = rsplugins.data.load(options.data, root=options.data_root, input_size=classifier.input_size)
indices = data.select(stride=options.stride)
shared: dict[str, Any] = {"sigma": options.sigma, "n0": 100}
windows = {**shared, "n": options.n, "number": options.windows}

rows: list[tuple[str, str, dict[str, Any]]] = [
    ("plain, equal n", "gaussian", {**shared, "n": options.n}),
    ("plain, equal passes", "gaussian", {**shared, "n": options.n * options.windows}),
]
for reduce in ("mean", "max"):
    for noise in ("common", "soft", "independent"):
        rows.append((f"{reduce}, {noise}", "smooth-reduce", {**windows, "reduce": reduce, "noise": noise}))

radii = [0.0, options.sigma, 2 * options.sigma, 3 * options.sigma]
print(f"| {options.model}, {len(indices)} inputs | guarantee | passes an input | abstained | ACR |", end="")
print("".join(f" r={radius:g} |" for radius in radii))
print("| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(radii))


def print_row(name: str, passes: int, results: list[Row]) -> None:
    """Print one line of the table."""
    abstained = sum(row.abstained for row in results) / len(results)
    curve = "".join(f" {100 * certified_count(results, radius) / len(results):.1f} |" for radius in radii)
    guarantee = next(row.claim.guarantee for row in results if row.claim is not None)
    average = f"{average_radius(results):.4f}" + ("" if guarantee.certifies else " (not certified)")
    print(f"| {name} | {guarantee} | {passes} | {100 * abstained:.1f} % | {average} |{curve}", flush=True)


for name, method, parameters in rows:
    entry = get_host().find("certifier", method)
    certifier = prepare(entry, classifier, parameters, Execution())
    directory = options.out / name.replace(", ", "-").replace(" ", "-")
    run = execute(entry, certifier, data, indices, directory, progress=for_stream(), model=options.model, data=options.data)
    passes = (parameters["n0"] + parameters["n"]) * (options.windows if method == "smooth-reduce" else 1)
    print_row(name, passes, list(run.rows))
    if parameters.get("noise") == "independent":
        # The same votes, read as the paper reads them.
        values = {**certifier.parameters.model_dump(), "noise": "as-published"}
        claim = entry.load_claim()
        published = [Row(row.record, claim(row.record.evidence, values)) for row in run.rows]
        print_row(name.replace("independent", "as-published"), passes, published)
