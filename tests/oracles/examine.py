"""Ask every certifier about a fuzzed model through the public API, and hold its claims against the truth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import rsplugins
from rsplugins.certificate import Certificate
from rsplugins.errors import PluginError, RspluginsError
from tests.oracles.grammar import Case, load
from tests.oracles.truth import Flaw, Truth

ALPHA = 1e-7
BOUNDS = ("ibp", "crown-ibp", "crown", "sound-etb")
METHODS = (*BOUNDS, "lipschitz-margin", "gaussian", "gaussian-soft", "smooth-reduce", "latent", "covariance-guided")


@dataclass(frozen=True)
class Request:
    """One question to one certifier."""

    method: str
    parameters: dict[str, Any]
    images: Tensor
    batch_size: int


@dataclass(frozen=True)
class FalseClaim:
    """A claim that does not hold, with what it takes to see it again."""

    case: Case
    request: Request
    certificate: Certificate
    flaw: Flaw

    def __str__(self) -> str:
        kinds = ", ".join(self.case.traps) or "no trap"
        parameters = ", ".join(f"{key}={value!r}" for key, value in self.request.parameters.items())
        return (
            f"seed {self.case.seed} ({kinds}): {self.certificate}\n    {self.request.method}({parameters}), batch_size="
            f"{self.request.batch_size}: {self.flaw.words}"
        )


@dataclass
class Report:
    """What came of one case.

    Attributes:
        claims: how many radii above 0 were certified, by method.
        refused: the words of those that refused, by method.
        false: claims that do not hold.
        crashes: other exceptions than the package's own refusals, by method.
    """

    case: Case
    claims: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    false: list[FalseClaim] = field(default_factory=list)
    crashes: dict[str, str] = field(default_factory=dict)


def requests(case: Case) -> Iterator[Request]:
    """Yield the questions about a case: small budgets, and parameters that its seed draws."""
    rng = np.random.default_rng([case.seed, 3])

    def choose(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    # Where the budget is the limit, and where the model is; much noise where averages over a batch would hide it.
    shared = any(kind.startswith(("batch", "random")) for kind in case.traps)
    sigma = round(case.distance * (choose(1.0, 2.5) if shared else choose(0.33, 1.0)), 4)
    ball = {"norm": choose("linf", "linf", "l2", "l1"), "clip": bool(rng.random() < 0.5), "tolerance": 0.004}
    budget = {"sigma": sigma, "n0": 10, "n": 200, "alpha": ALPHA}
    batch_size = choose(7, 50, 64, 64)
    for method in BOUNDS:
        yield Request(method, ball, case.images, batch_size)
    yield Request("lipschitz-margin", {}, case.images, batch_size)
    yield Request("gaussian", budget, case.images, batch_size)
    yield Request("gaussian-soft", budget, case.images, batch_size)
    yield Request("covariance-guided", {"sigma": sigma, "n": 200, "n_min": 150, "alpha": ALPHA}, case.images, batch_size)
    noise, scores, reduce = (
        choose("common", "independent", "soft"),
        choose("logits", "probabilities"),
        choose("mean", "mean", "max"),
    )
    windows = {"noise": noise, "scores": scores, "reduce": reduce, "stride": 1, "resize": "none"}
    larger = F.pad(case.images, (0, 1, 0, 1), mode="replicate") if rng.random() < 0.7 else case.images
    yield Request("smooth-reduce", budget | windows, larger, batch_size)
    yield Request("latent", budget | {"split": choose(*case.layers), "margin": False}, case.images, batch_size)


def ask(case: Case, request: Request, folder: Path) -> list[Certificate]:
    """Return the certificates of a fresh copy of the model, as a user would get them."""
    model = load(case.source, folder).make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = rsplugins.wrap(model, mean=case.mean, std=case.std, input_size=tuple(case.images.shape[1:]))
        return rsplugins.certify(
            classifier, request.images, request.method, seed=case.seed, batch_size=request.batch_size, **request.parameters
        )


def check(truth: Truth, request: Request, certificate: Certificate, image: Tensor) -> Flaw | None:
    """Return why a certificate is false, or None when it stands."""
    label, radius = certificate.prediction, certificate.radius
    if label is None or radius <= 0 or not certificate.guarantee.certifies:
        return None
    p = request.parameters
    if request.method in BOUNDS or request.method == "lipschitz-margin":
        return truth.attack(image, label, radius, str(certificate.norm), clip=p.get("clip", False))
    soft = request.method == "gaussian-soft" or p.get("noise") == "soft"
    if request.method == "latent":
        draws = [truth.draw_latent(context, p["sigma"], p["split"]) for context in truth.contexts]
    elif request.method == "smooth-reduce":
        draws = [truth.draw_windows(context, p["sigma"], p) for context in truth.contexts]
    else:
        draws = [truth.draw_gaussian(context, p["sigma"]) for context in truth.contexts]
    return truth.smoothed(draws, image, label, radius, soft=soft)


def _group(request: Request, certificate: Certificate) -> tuple[Any, ...]:
    """Claims about one function, class and kind of ball: where the largest stands, so do the others."""
    method = request.method
    if method in BOUNDS or method == "lipschitz-margin":
        return (certificate.norm, request.parameters.get("clip", False), certificate.index, certificate.prediction)
    method = "gaussian" if method == "covariance-guided" else method
    return (method, certificate.index, certificate.prediction)


def examine(case: Case, folder: Path, methods: Sequence[str] = METHODS) -> Report:
    """Ask all certifiers and check what they claim."""
    report, claims = Report(case), dict[tuple[Any, ...], list[tuple[Request, Certificate]]]()
    for request in requests(case):
        if request.method not in methods:
            continue
        try:
            certificates = ask(case, request, folder)
        except PluginError as error:
            report.crashes[request.method] = str(error)
        except RspluginsError as error:
            report.refused[request.method] = str(error)
        except Exception as error:
            report.crashes[request.method] = f"{type(error).__name__}: {error}"
        else:
            for certificate in certificates:
                if certificate.guarantee.certifies and certificate.radius > 0:
                    report.claims[request.method] = report.claims.get(request.method, 0) + 1
                    claims.setdefault(_group(request, certificate), []).append((request, certificate))
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        report.false = list(_false(Truth(case, folder), claims.values()))
    return report


def _false(truth: Truth, groups: Any) -> Iterator[FalseClaim]:
    for group in groups:
        for request, certificate in sorted(group, key=lambda pair: -pair[1].radius):
            flaw = check(truth, request, certificate, request.images[certificate.index])
            if flaw is None:
                break
            yield FalseClaim(truth.case, request, certificate, flaw)
