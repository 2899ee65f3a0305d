"""Which methods run on which stock models: the networks of the wrap rate, offline, random weights, one random image.

    python tests/models/method_rate.py                    # what is not in the results yet, then docs/method-rate.md
    python tests/models/method_rate.py --models resnet    # those whose reference contains one of these words; no page
    python tests/models/method_rate.py --list

Each method runs on each model in a process of its own, with a time limit. Results are kept, one JSON line each, so that an
interrupted run goes on where it was; deleting the file starts anew.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a program, it sees its own folder only

import rsplugins
from rsplugins.errors import RspluginsError
from tests.models import wrap_rate

LARGEST = 100e6
EPS = 1 / 255
LIMIT = 200
"""Seconds of a processor that one method may take on one model, making the model included."""
SIZES = (64, 96, 112, 128, 160, 192, 224, 256)
METHODS: dict[str, dict[str, Any]] = {
    "gaussian": {"sigma": 0.25, "n0": 10, "n": 100},
    "smooth-reduce": {"sigma": 0.25, "n0": 10, "n": 100},
    "covariance": {"sigma": 0.25},
    "covariance-guided": {"sigma": 0.25, "n": 100, "n_min": 50},
    "latent": {"split": "auto", "n0": 10, "n": 100},
    "lipschitz-margin": {},
    "ibp": {"eps": EPS},
    "crown-ibp": {"eps": EPS},
    "crown": {"eps": EPS},
    "sound-etb": {"eps": EPS},
}
SHARES = {
    "gaussian": 1.0,
    "smooth-reduce": 1.0,
    "covariance": 0.95,
    "covariance-guided": 0.95,
    "latent": 0.85,
    "lipschitz-margin": 0.9,  # of networks without attention
    "ibp": 0.8,
    "crown-ibp": 0.65,
    "sound-etb": 0.65,
}
"""What the issue asks for; the marked test holds what the page reached."""

_HERE = Path(__file__).resolve().parent
PAGE = wrap_rate.PAGE.with_name("method-rate.md")
RESULTS = _HERE / "method_rate.jsonl"
_OURS, _LARGE = "out of time", "left out: more than 100 M parameters"


def references() -> list[str]:
    """Return the networks of docs/wrap-rate.md."""
    timm = [f"timm:{name}" for name in wrap_rate.timm_sample()]
    return [*timm, *(f"robustbench:{'/'.join(parts)}" for parts in wrap_rate.robustbench_sample())]


def large() -> set[str]:
    """Return the networks that docs/wrap-rate.md says are too large, which take minutes to build."""
    rows = re.findall(r"\| `([^`]+)` \| (\d+) \|", wrap_rate.PAGE.read_text(encoding="utf-8"))
    return {name for name, millions in rows if int(millions) * 1e6 > LARGEST}


def load(reference: str) -> tuple[rsplugins.Classifier, int]:
    """Return a model with random weights at the smallest input that it takes, and its number of parameters."""
    classifier = _loaded(reference, None)
    own = classifier.input_size
    assert own is not None
    parameters = sum(parameter.numel() for parameter in classifier.module.parameters())
    if parameters > LARGEST:
        return classifier, parameters
    for size in SIZES:
        if size < own[-1]:
            try:
                smaller = _loaded(reference, size)
                with torch.no_grad():
                    logits = smaller(torch.rand(2, *own[:-2], size, size))
                smaller.check_logits(logits, batch=2)
                return smaller, parameters
            except Exception:
                continue
    return classifier, parameters


def _loaded(reference: str, size: int | None) -> rsplugins.Classifier:
    torch.manual_seed(wrap_rate.SEED)
    options = {}
    if size is not None and reference.startswith("timm:"):
        import timm

        builder = inspect.getmodule(timm.model_entrypoint(reference.removeprefix("timm:")))
        options = {"img_size": size} if "img_size" in inspect.getsource(builder) else {}  # type: ignore[arg-type]
    try:
        classifier = rsplugins.load(reference, pretrained=False, **options)
    except Exception:
        if not options:
            raise
        classifier = rsplugins.load(reference, pretrained=False)
    if size is not None and classifier.input_size is not None and classifier.input_size[-1] != size:
        from rsplugins.classifier import wrap

        classifier = wrap(
            classifier.module,
            mean=classifier.mean,
            std=classifier.std,
            input_size=(*classifier.input_size[:-2], size, size),
            source=reference,
        )
    return classifier


def attempt(reference: str, method: str) -> dict[str, Any]:
    """Run one method on one model, here; returns a line of the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"model": reference, "method": method, "works": False, "note": ""}
    if reference in large():
        return {**found, "note": _LARGE}
    try:
        classifier, found["parameters"] = load(reference)
        found["input"] = list(classifier.input_size or ())
        found["attention"] = has_attention(classifier)
        if found["parameters"] > LARGEST:
            return {**found, "note": _LARGE}
        torch.manual_seed(wrap_rate.SEED)
        image = torch.rand(1, *found["input"])
        start = time.process_time()
        (certificate,) = rsplugins.certify(classifier, image, method, progress=False, **METHODS[method])
        found |= {"works": not certificate.error, "note": certificate.error or "", "radius": certificate.radius}
        found["seconds"] = round(time.process_time() - start, 2)
        found["linearised"] = certificate.evidence.get("linearised", [])
    except RspluginsError as error:
        found["note"] = " ".join(f"{error.what} {error.cause}".split())
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip() or "no message").splitlines()[0]
        found["note"] = f"{type(error).__name__} ({Path(last.filename).name}:{last.lineno}): {text}"
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found


def has_attention(classifier: rsplugins.Classifier) -> bool:
    """Return whether tokens are weighted by a softmax of products of themselves, by the names of the network's layers."""
    return any("attn" in name.lower() or "attention" in type(layer).__name__.lower() for name, layer in _tokens(classifier))


def _tokens(classifier: rsplugins.Classifier) -> Iterator[tuple[str, torch.nn.Module]]:
    # Channel attention (squeeze and excitation) goes by the same name in some networks, but has no tokens.
    for name, layer in classifier.module.named_modules():
        if any(hasattr(layer, part) for part in ("qkv", "q", "to_q", "in_proj_weight", "query", "q_proj", "qkv_proj", "qk")):
            yield name + ".attn", layer


def separately(reference: str, method: str) -> dict[str, Any]:
    """Run one method on one model in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        os.dup2(quiet, 1)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))  # kills
        with os.fdopen(writing, "w") as file:
            file.write(json.dumps(attempt(reference, method)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    what = f"{_OURS}: {LIMIT} s" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else "killed (memory)"
    return {"model": reference, "method": method, "works": False, "note": what}


def known() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results so far, by model and method; the last line of a pair counts."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["method"]): row for row in rows}


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--models", nargs="*", help="only references that contain one of these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="only these methods")
    parser.add_argument("--refused", action="store_true", help="also run anew what did not work")
    parser.add_argument("--part", default="0/1", help="I/K: every K-th pair from the I-th on, to share the work")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    done = known()
    chosen = [name for name in references() if not arguments.models or any(word in name for word in arguments.models)]
    pairs = [(name, method) for name in chosen[part::parts] for method in arguments.methods]
    for name, method in pairs:
        before = done.get((name, method))
        if before is not None and (before["works"] or not arguments.refused or "left out" in before["note"]):
            continue
        if arguments.list:
            sys.stdout.write(f"{name} {method}\n")
            continue
        found = separately(name, method)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        sys.stderr.write(f"{name} {method} {'works' if found['works'] else found['note'][:200]} {found.get('seconds', '')}\n")
    if not arguments.list and not arguments.models:
        PAGE.write_text(page(known()), encoding="utf-8")


def shares(rows: dict[tuple[str, str], dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    """Return, by method, on how many networks it works, on how many it was tried, and how many there are."""
    small = {name for name, _ in rows} - {name for (name, _), row in rows.items() if "left out" in row["note"]}
    tokens = {name for (name, _), row in rows.items() if row.get("attention")}
    found = {}
    for method in METHODS:
        names = small - tokens if method == "lipschitz-margin" else small
        mine = [rows[name, method] for name in names if (name, method) in rows]
        found[method] = sum(row["works"] for row in mine), len(mine), len(names)
    return found


def page(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return the page."""
    sizes = ", ".join(map(str, SIZES))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "robustbench", "auto-LiRPA"))
    settings = "\n".join(
        f"* `{name}`: {', '.join(f'{key}={value}' for key, value in kept.items()).replace(str(EPS), '1/255') or 'defaults'}"
        for name, kept in METHODS.items()
    )
    totals = [
        f"| `{method}` | {good} of {every} | {100 * good // max(every, 1)} % | {every - tried} | {_goal(method)} |"
        for method, (good, tried, every) in shares(rows).items()
    ]
    tables = "\n".join(_section(rows, source) for source in ("timm:", "robustbench:"))
    return f"""# Method rate

Written by `python tests/models/method_rate.py`: offline, random weights, one random image, one thread of a CPU, at most
{LIMIT} s for a method on a model with all its checks. The networks are those of [wrap-rate](wrap-rate.md); those above 100
million parameters are left out. Each is run at the smallest of {sizes} pixels that it takes, or at its own size.

{settings}

A method works when it returns a certificate without an error, whatever the radius: on random weights most are 0. Networks that
a method was not run on yet count as if it did not work there, and have an empty cell. What a method is worth on trained weights
is in [performance](performance.md). The share of `lipschitz-margin` is of the networks without attention over tokens, which has
no Lipschitz bound.

Versions: {versions}.

| method | works on | share | not run yet | wanted |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(totals)}

Seconds and the peak of the process in GiB stand where a method works; a number marked * took part with operators that were
linearised at the mean. Elsewhere a letter points to the reason below the table.

{tables}"""


def _goal(method: str) -> str:
    return f"{100 * SHARES[method]:.0f} %" if method in SHARES else ""


def _section(rows: dict[tuple[str, str], dict[str, Any]], source: str) -> str:
    names = list(dict.fromkeys(name for name, _ in rows if name.startswith(source)))
    reasons: dict[str, int] = {}
    lines = [f"| model | input | {' | '.join(METHODS)} |", f"| --- | ---: |{' ---: |' * len(METHODS)}"]
    for name in names:
        cells, size = [], ""
        for method in METHODS:
            row = rows.get((name, method))
            if row is None:
                cells.append("")
                continue
            size = size or "x".join(map(str, row.get("input", [])[1:]))
            if row["works"]:
                star = "*" if row.get("linearised") else ""
                cells.append(f"{row['seconds']:.1f} s, {row['peak_mib'] / 1024:.1f}{star}")
            else:
                note = row["note"].split(" Nothing was certified")[0][:300].replace("|", "\\|")
                cells.append(f"[{reasons.setdefault(note, len(reasons) + 1)}]")
        lines.append(f"| `{name.removeprefix(source)}` | {size} | {' | '.join(cells)} |")
    said = "\n".join(f"{number}. {note}" for note, number in reasons.items())
    return f"## {source.rstrip(':')}\n\n" + "\n".join(lines) + f"\n\nReasons:\n\n{said}\n"


if __name__ == "__main__":
    main()
