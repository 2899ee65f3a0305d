"""From records to claims, without the model and without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rsplugins.certificate import Claim, Evidence, Guarantee, Norm
from rsplugins.errors import RunError
from rsplugins.runs.manifest import Manifest
from rsplugins.runs.record import Record
from rsplugins.runs.stored import loaded

ClaimFunction = Callable[[Evidence, Mapping[str, Any]], Claim]
IMPORTED = "imported/not-recomputable"


@dataclass(frozen=True)
class Row:
    """One input of a run with its claim; ``claim`` is None when the input failed."""

    record: Record
    claim: Claim | None

    @property
    def index(self) -> int:
        """The input's stable index."""
        return self.record.index

    @property
    def prediction(self) -> int | None:
        """The class, or None for an abstention or a failure."""
        return None if self.claim is None else self.claim.prediction

    @property
    def radius(self) -> float:
        """The radius claimed, right or wrong; 0.0 for an abstention or a failure."""
        return 0.0 if self.claim is None or self.claim.prediction is None else self.claim.radius

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.prediction is not None and self.prediction == self.record.label

    @property
    def abstained(self) -> bool:
        """Whether the certifier made no claim although the input was processed."""
        return self.claim is not None and self.claim.prediction is None

    @property
    def failed(self) -> bool:
        """Whether the input could not be processed."""
        return self.record.error is not None


def claim_function(manifest: Manifest) -> ClaimFunction:
    """Find the torch-free function that reads claims out of a run's evidence, through the host.

    Raises:
        UnknownNameError: no installed plugin brings the run's certifier.
    """
    if manifest.imported is not None:
        return imported_claim
    from rsplugins.host import get_host

    function: ClaimFunction = get_host().find("certifier", manifest.method).load_claim()
    return function


def imported_claim(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """Repeat the claim of a log that another program wrote; there is no evidence to recompute it from."""
    predict = evidence["predict"]
    return Claim(
        prediction=None if predict < 0 else predict,
        radius=0.0 if predict < 0 else evidence["radius"],
        guarantee=Guarantee(parameters["guarantee"]),
        norm=Norm(parameters["norm"]),
        alpha=parameters["alpha"],
        rule=IMPORTED,
        assumptions=("claimed by the program that wrote the log",),
    )


def score(records: Iterable[Record], claim: ClaimFunction, parameters: Mapping[str, Any]) -> list[Row]:
    """Compute the claim of every record.

    Raises:
        RunError: the evidence of a record cannot be read by the certifier's claim function.
    """
    return [Row(record, None if record.error is not None else _claim(record, claim, parameters)) for record in records]


def _claim(record: Record, claim: ClaimFunction, parameters: Mapping[str, Any]) -> Claim:
    try:
        said = claim(loaded(record.evidence), parameters)
        if math.isnan(said.radius):
            raise ValueError("its radius is not a number")
        return said
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"the evidence of input {record.index} cannot be read: {type(error).__name__}: {error}",
            cause="the record was edited, or the certifier that wrote it has another version",
            fix="certify that input again, or install the version that the manifest names",
        ) from error
