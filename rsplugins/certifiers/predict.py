"""The method ``predict``: the model's class of each input, without noise and without a guarantee."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import Field

from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input, in_batches
from rsplugins.classifier import Classifier


class PredictParameters(CertifierParameters):
    """Parameters of ``predict``."""

    batch: int = Field(64, ge=1, description="inputs that are predicted together; a tie in the last bit may depend on it")


class Predict(Certifier[PredictParameters]):
    """Predictions of the model as it is. NONE: nothing is promised."""

    Parameters = PredictParameters

    def __init__(self, classifier: Classifier, parameters: PredictParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        execution.refuse_changes("predict")
        self.group = parameters.batch

    @torch.no_grad()
    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield the class of the largest logit."""
        for batch in in_batches(inputs, self.group):
            begun = time.perf_counter()
            alike = len({one.image.shape for one in batch}) == 1
            groups = [batch] if alike else [[one] for one in batch]
            logits = [row for group in groups for row in self.classifier(torch.stack([one.image for one in group]))]
            seconds = (time.perf_counter() - begun) / len(batch)
            for one, row in zip(batch, logits, strict=True):
                found: dict[str, Any] = {"prediction": int(row.argmax())}
                error = None if bool(row.isfinite().all()) else "the logits are not finite"
                yield Gathered(one.index, {} if error else found, 1, seconds, error)
