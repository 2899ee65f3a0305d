"""Deterministic radii from margins and Lipschitz bounds: the certifier ``lipschitz-margin``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from rsplugins.arithmetic import full_precision, spoken
from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.double import bring, brought
from rsplugins.errors import ParameterError
from rsplugins.lipschitz.analysis import analyse, private_copy
from rsplugins.lipschitz.margins import MarginBounds

_SLACK = 1e-9
_BATCH = 16


class LipschitzMarginParameters(CertifierParameters):
    """``lipschitz-margin`` has nothing to set."""


class LipschitzMargin(Certifier[LipschitzMarginParameters]):
    """Certified l2 radii of the classifier itself: the margin over a bound of how fast it can shrink. DETERMINISTIC.

    Fast, one forward pass an input, and of use for networks built to have a small bound; the radii of an ordinary deep network
    are valid and tiny. Logits are computed in float64.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: none.
        execution: of which only the dtype is looked at.

    Raises:
        UnsupportedLayerError: a layer has no bound.
        UsageError: the network cannot be copied or traced.
        ParameterError: the bound is zero, infinite or NaN, or the dtype is not float32.
    """

    Parameters = LipschitzMarginParameters

    def __init__(self, classifier: Classifier, parameters: LipschitzMarginParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        if execution.dtype != "float32":
            raise ParameterError(
                f"The bounds do not hold for a model run in {execution.dtype}.",
                cause="they bound the network in exact arithmetic, of which bfloat16 is too coarse a copy.",
                fix="Run this method with dtype float32.",
            )
        self.analysis = analyse(classifier)
        self.bounds = MarginBounds(self.analysis)
        self._double = brought(private_copy(classifier), torch.float64)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield margins and bounds, in the form that :func:`rsplugins.lipschitz.claims.lipschitz_margin` documents.

        Raises:
            UsageError: the weights have changed since the certifier was made.
        """
        stream = iter(inputs)
        while batch := list(islice(stream, _BATCH)):
            self.analysis.check_unchanged(self.classifier)
            start = time.perf_counter()
            images = bring(torch.stack([item.image for item in batch]), self._double.device, torch.float64)
            with full_precision(), torch.inference_mode():
                logits = self._double(images)
            self.classifier.check_logits(logits, batch=len(batch))
            found = [self.bounds.evidence(row, _SLACK) for row in logits]
            seconds = (time.perf_counter() - start) / len(batch)
            for item, evidence in zip(batch, found, strict=True):
                yield Gathered(item.index, evidence, samples=0, seconds=seconds)

    @full_precision()
    def describe(self) -> dict[str, Any]:
        """Return the bound of the network, and in which arithmetic logits are computed, as JSON values."""
        return {"lipschitz": self.bounds.constant, "arithmetic": spoken(self.classifier.device, torch.float64)}
