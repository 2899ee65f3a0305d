"""What a verdict of a bound method costs beside auto-LiRPA itself with its graph kept, in turns.

    uv run python benchmarks/bounds.py [--threads 2] [--rounds 5] [--auto-lirpa CHECKOUT] [--model zoo:ID] [--eps 0.1]

For each of ``ibp``, ``crown`` and ``alpha-crown``, one image at a fixed eps:

* peer: ``compute_bounds`` of one BoundedModule that was made before, in float32, on the margins' specification;
* first: ``rsplugins.certify`` of a model that no call has seen, with an empty cache on disk;
* again: the same call of the same model;
* largest: the largest certified radius (no eps), over a verdict: both ``again``.

Medians of rounds that alternate; ratios are seconds over the peer's. The auto-LiRPA of the environment, or of a checkout.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    """Run something once."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def peer(classifier: torch.nn.Module, image: torch.Tensor, eps: float, method: str) -> Callable[[], object]:
    """Return one call of auto-LiRPA for all margins of one image, over a graph that is there."""
    from rsplugins.compat import bridge_auto_lirpa
    from rsplugins.lirpa.search import margin_rows

    lirpa = bridge_auto_lirpa()
    # As its users write it: bounds of the network on normalised pixels.
    graph = lirpa.BoundedModule(copy.deepcopy(classifier.module).eval(), image)
    with torch.no_grad():
        logits = classifier.module(image)
    specification = margin_rows(logits.argmax(1), logits.shape[1])
    ball = lirpa.PerturbationLpNorm(norm=math.inf, eps=eps)

    def run() -> object:
        graph(lirpa.BoundedTensor(image, ball))
        return graph.compute_bounds(x=(lirpa.BoundedTensor(image, ball),), C=specification, method=method, bound_upper=False)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--auto-lirpa", help="a checkout to take in place of the installed release")
    parser.add_argument("--model", default="zoo:mnist-small.mnist-ibp010-v2")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--methods", nargs="+", default=["ibp", "crown", "alpha-crown"])
    options = parser.parse_args()
    if options.auto_lirpa:
        sys.path.insert(0, options.auto_lirpa)
    torch.set_num_threads(options.threads)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    import rsplugins
    from rsplugins.compat import bridge_auto_lirpa
    from rsplugins.machine import cache
    from rsplugins.provenance import processor

    release = bridge_auto_lirpa().__version__
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, auto-LiRPA {release}, {options.model}")
    classifier = rsplugins.load(options.model)
    image = torch.rand(1, *classifier.input_size, generator=torch.Generator().manual_seed(1))
    for method in options.methods:
        theirs = peer(classifier, image, options.eps, method)

        def verdict(model: rsplugins.Classifier, method: str = method) -> object:
            return rsplugins.certify(model, image, method, eps=options.eps)

        times: dict[str, list[float]] = {"peer": [], "first": [], "again": [], "largest": []}
        for number in range(options.rounds + 1):
            fresh = copy.deepcopy(classifier)
            cache._KNOWN.clear()  # what this process knows is taken for another's
            os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
            cost = {
                "first": seconds(lambda fresh=fresh: verdict(fresh)),
                "again": seconds(lambda fresh=fresh: verdict(fresh)),
                "largest": seconds(lambda fresh=fresh, method=method: rsplugins.certify(fresh, image, method)),
                "peer": seconds(theirs),
            }
            for name in times if number else ():
                times[name].append(cost[name])
        median = {name: statistics.median(found) for name, found in times.items()}
        print(
            f"{method}: peer {1e3 * median['peer']:.1f} ms; first {median['first'] / median['peer']:.1f}, "
            f"again {median['again'] / median['peer']:.1f} times the peer; "
            f"largest radius {median['largest'] / median['again']:.1f} verdicts "
            f"({median['again']:.3f} s, {median['largest']:.3f} s)"
        )


if __name__ == "__main__":
    main()
