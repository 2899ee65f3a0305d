"""How many models wrap: a seeded sample of timm classifiers and the RobustBench architectures, offline, random weights.

    python tests/models/wrap_rate.py            # writes docs/wrap-rate.md

A model counts when it loads, wraps, and gives finite logits of the right shape on one random image, twice the same.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch

import rsplugins
from rsplugins.errors import RspluginsError
from rsplugins.models import robustbench

SEED, SAMPLE, ARCHITECTURES = 0, 60, 40
PAGE = Path(__file__).resolve().parents[2] / "docs" / "wrap-rate.md"


@dataclass(frozen=True)
class Outcome:
    """What became of one model."""

    reference: str
    good: bool
    parameters: int
    seconds: float
    note: str = ""


def timm_sample(count: int = SAMPLE, seed: int = SEED) -> list[str]:
    """Return names drawn from all timm architectures whose default configuration has a classification head."""
    # Names that other tests or plugins registered have no configuration of timm's own.
    configured = {name: timm.get_pretrained_cfg(name) for name in timm.list_models()}
    heads = [name for name, configuration in configured.items() if configuration is not None and configuration.num_classes]
    return sorted(random.Random(seed).sample(heads, count))


def robustbench_sample(count: int | None = ARCHITECTURES, seed: int = SEED) -> list[tuple[str, str, str]]:
    """Return names drawn from the different RobustBench networks; None for all."""
    every = robustbench_architectures()
    return every if count is None else sorted(random.Random(seed).sample(every, count))


def robustbench_architectures() -> list[tuple[str, str, str]]:
    """Return one (data set, threat model, name) for each different network, by data set; the first name stands for the rest.

    Two names build the same network when their entries make objects of one class (the WideResNets of one data set, say) from
    closures of the same code, so only what differs in class or code is built.
    """
    seen: dict[tuple[object, ...], tuple[str, str, str]] = {}
    for dataset, threats in robustbench.catalogue().items():
        for threat, models in threats.items():
            for name, entry in models.items():
                seen.setdefault((dataset, _recipe(entry["model"])), (dataset, threat, name))
    return sorted(seen.values())


def _recipe(model: Callable[..., object]) -> object:
    if isinstance(model, type):
        return model
    code = model.__code__  # type: ignore[attr-defined]
    return code.co_names, tuple(constant for constant in code.co_consts if not hasattr(constant, "co_code")), code.co_freevars


def attempt(reference: str, **options: object) -> Outcome:
    """Load one model with random weights and run it on one image."""
    start, parameters = time.perf_counter(), 0
    try:
        torch.manual_seed(SEED)
        classifier = rsplugins.load(reference, pretrained=False, **options)
        parameters = sum(parameter.numel() for parameter in classifier.module.parameters())
        assert classifier.input_size is not None
        image = torch.rand(1, *classifier.input_size)
        classifier.check_ready()
        classifier.check_images(image)
        with torch.no_grad():
            logits = classifier(image)
            classifier.check_logits(logits, batch=1)
            same = torch.equal(logits, classifier(image)) if parameters < 100e6 else True
        note = "" if same else "two passes over one image differ: it draws random numbers in eval mode"
        return Outcome(reference, same, parameters, time.perf_counter() - start, note)
    except RspluginsError as error:
        return Outcome(reference, False, parameters, time.perf_counter() - start, f"{error.what} {error.fix}")
    except Exception as error:  # anything a third party's constructor raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Outcome(reference, False, parameters, time.perf_counter() - start, f"{type(error).__name__}: {first}")
    finally:
        gc.collect()


def run_timm(names: list[str]) -> Iterator[Outcome]:
    """Try timm models."""
    return (attempt(f"timm:{name}") for name in names)


def run_robustbench(names: list[tuple[str, str, str]]) -> Iterator[Outcome]:
    """Try RobustBench architectures."""
    return (attempt(f"robustbench:{dataset}/{threat}/{name}") for dataset, threat, name in names)


def table(title: str, outcomes: list[Outcome]) -> str:
    """Return one section of the page."""
    good = sum(outcome.good for outcome in outcomes)
    lines = [
        f"## {title}: {good} of {len(outcomes)} ({100 * good / len(outcomes):.0f} %)",
        "",
        "| model | parameters, millions | wraps |",
        "| --- | ---: | --- |",
    ]
    lines += [f"| `{o.reference}` | {o.parameters / 1e6:.0f} | {'yes' if o.good else 'no: ' + o.note} |" for o in outcomes]
    return "\n".join(lines) + "\n"


def page(sections: list[tuple[str, list[Outcome]]]) -> str:
    """Return the whole page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "robustbench"))
    return f"""# Wrap rate

Written by `python tests/models/wrap_rate.py`: offline, random weights, one random image each, on a CPU. A model counts when it
loads, wraps, and gives finite logits of the right shape, the same twice (models above 100 million parameters run once).

* timm: {SAMPLE} drawn with seed {SEED} from all architectures whose default configuration has a head, whatever their size.
* RobustBench: {ARCHITECTURES} drawn with seed {SEED} from the {len(robustbench_architectures())} networks that differ in class or
  constructor, by data set; the first name of each stands for the others (`--all` runs them all).

Versions: {versions}.

""" + "\n".join(table(title, outcomes) for title, outcomes in sections)


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--all", action="store_true", help="every RobustBench network in place of a sample")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    jobs = [
        ("timm", [f"timm:{name}" for name in timm_sample()]),
        (
            "RobustBench",
            [f"robustbench:{'/'.join(parts)}" for parts in robustbench_sample(None if arguments.all else ARCHITECTURES)],
        ),
    ]
    sections = []
    for title, references in jobs:
        outcomes = []
        for reference in references:
            if arguments.list:
                sys.stdout.write(reference + "\n")
                continue
            outcomes.append(attempt(reference))
            last = outcomes[-1]
            sys.stderr.write(
                f"{reference} {'yes' if last.good else last.note} {last.parameters / 1e6:.0f}M {last.seconds:.1f}s\n"
            )
        sections.append((title, outcomes))
    if not arguments.list:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
