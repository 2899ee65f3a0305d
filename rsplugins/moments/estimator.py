"""From images to logit Gaussians, for the certifiers: chooses the representation, says what it needs, and cuts the batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.special import log_ndtr, logsumexp

from rsplugins.arithmetic import full_precision
from rsplugins.certifier import LARGEST_SIGMA, CertifierParameters, Input
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.lirpa.diagnosis import FixedBatchError, NotBoundedError
from rsplugins.lirpa.graph import check_batch_sizes
from rsplugins.moments.channel import Channel
from rsplugins.moments.claims import KEPT
from rsplugins.moments.exported import ExportedNetwork
from rsplugins.moments.full import Full
from rsplugins.moments.low_rank import LowRank
from rsplugins.moments.memory import COMFORT, choose, estimate, in_words
from rsplugins.moments.network import LogitGaussian, MomentNetwork
from rsplugins.moments.operations import Representation
from rsplugins.moments.rules import Rule

_BATCH = 16


class MomentParameters(CertifierParameters):
    """What the user may set of the propagation."""

    sigma: float = Field(0.25, gt=0, le=LARGEST_SIGMA, description="standard deviation of the noise, on raw [0, 1] pixels")
    representation: Literal["auto", "full", "low-rank", "channel", "published"] = Field(
        "auto", description="of the covariance; 'auto' takes 'full' for small networks and 'low-rank' for others"
    )
    rank: int = Field(64, ge=1, description="columns of the factor of 'low-rank'")
    inflation: float | Literal["sound"] = Field(
        0.0, description="of 'channel': S is multiplied by 1 + this after each convolution but the first; 'sound': by its taps"
    )
    cross: Literal["exact", "first-order"] = Field("exact", description="covariance between activations of 'full'")
    memory_gib: float = Field(2.0, gt=0, description="the most memory that one input may take")


class Estimate(NamedTuple):
    """What propagation says of one input.

    Attributes:
        item: the input.
        evidence: see :mod:`rsplugins.moments.claims`.
        seconds: its share of the time.
    """

    item: Input
    evidence: dict[str, Any]
    seconds: float


class Estimator:
    """Propagates inputs through a classifier in float64.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`MomentParameters`.
        rules: plugins' rules.
        label: what to call it when it says on standard error how much memory it needs.

    Raises:
        ParameterError: a layer without a rule, or a representation that does not fit.
        UsageError: batch normalisation or dropout in training mode.
    """

    def __init__(self, classifier: Classifier, parameters: MomentParameters, rules: Mapping[str, Rule], label: str) -> None:
        self.classifier, self.parameters, self._rules, self._label = classifier, parameters, rules, label
        self.representation = self._needs = ""
        self._network: MomentNetwork | ExportedNetwork | None = None
        if classifier.input_size is not None:
            self._prepare(torch.zeros(1, *classifier.input_size))

    def run(self, inputs: Iterable[Input]) -> Iterator[Estimate]:
        """Yield an estimate for each input, in order; inputs are consumed a batch ahead."""
        stream = iter(inputs)
        while first := next(stream, None):
            start = time.perf_counter()
            network = self._network or self._prepare(first.image.unsqueeze(0))
            sys.stderr.write(self._needs)
            self._needs = ""  # said once, and not where nothing is left to do
            batch = [first, *islice(stream, self._batch - 1)]
            with full_precision(), torch.no_grad():
                images = torch.stack([item.image for item in batch])
                if isinstance(network, ExportedNetwork):
                    found, linear = network.propagate(images, self.parameters.sigma), network.linearised
                else:
                    found, linear = network.propagate(images, self.parameters.sigma, self._make()), []
            evidence = [evidence_of(LogitGaussian(found.mean[row], found.covariance[row])) for row in range(len(batch))]
            for said in evidence if linear else ():
                said["linearised"] = linear
            seconds = (time.perf_counter() - start) / len(batch)
            yield from (Estimate(item, said, seconds) for item, said in zip(batch, evidence, strict=True))

    @full_precision()
    def _prepare(self, images: torch.Tensor) -> MomentNetwork | ExportedNetwork:
        p = self.parameters
        network = self._traced(images)
        if isinstance(network, ExportedNetwork):
            self.representation, self._batch, self._network = "low-rank", 1, network
            self._needs = f"{self._label}: one image at a time, over the graph of torch.export\n"
            return network
        needs = estimate(network.sizes, network.inputs, rank=p.rank)
        limit = int(p.memory_gib * 2**30)
        said = ", ".join(f"{in_words(size)} with {name}" for name, size in needs.items())
        self.representation = choose(needs, p.representation, limit)
        self._needs = f"{self._label}: one input needs about {said}\n{self._label}: using {self.representation}\n"
        needed = needs.get(self.representation, needs["channel"])
        # small enough for the caches: larger batches are no faster
        self._batch = max(1, min(_BATCH, min(limit, 2 * COMFORT) // max(needed, 1)))
        self._network = network
        return network

    def _traced(self, images: torch.Tensor) -> MomentNetwork | ExportedNetwork:
        """Return auto-LiRPA's graph where every operator of it has a rule, otherwise torch.export's."""
        p = self.parameters
        free = p.representation in ("auto", "low-rank")
        try:
            network = MomentNetwork(self.classifier, images, rules=self._rules, dtype=torch.float64, explain=not free)
        except (NotBoundedError, FixedBatchError):
            # A trace for one batch size is no hindrance: images go one by one there. What else is wrong, is wrong there too.
            if not free:
                raise
            check_batch_sizes(self.classifier, images)  # moments there are of one image alone
            return ExportedNetwork(self.classifier, images, rank=p.rank)
        try:
            network.check_rules()
        except ParameterError:
            if not free:
                raise
        else:
            return network
        return ExportedNetwork(self.classifier, images, rank=p.rank)

    @property
    def rules(self) -> list[str]:
        """Plugins' rules that take part, as records name them."""
        return list(getattr(self._rules, "took_part", ()))

    def _make(self) -> Representation:
        p = self.parameters
        if self.representation == "full":
            return Full(p.cross)
        if self.representation == "low-rank":
            return LowRank(p.rank)
        if self.representation == "published":
            return Channel(0.1, published=True)
        return Channel(p.inflation)


def evidence_of(found: LogitGaussian) -> dict[str, Any]:
    """Return the evidence of one input, mean (K,) and covariance (K, K), as JSON values."""
    mean, covariance = found.mean.cpu().double().numpy(), found.covariance.cpu().double().numpy()
    order = np.argsort(-mean, kind="stable")
    kept, rest = order[:KEPT], order[KEPT:]
    others = None
    if len(rest):
        first = kept[0]
        variance = covariance[first, first] + covariance[rest, rest] - 2 * covariance[first, rest]
        z = (mean[first] - mean[rest]) / np.sqrt(variance.clip(1e-300))
        others = float(logsumexp(log_ndtr(-z.clip(0, 1e9))))
    return {
        "kept": kept.tolist(),
        "mean": mean[kept].tolist(),
        "covariance": covariance[np.ix_(kept, kept)].tolist(),
        "others": others,
    }
