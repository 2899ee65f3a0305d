"""The numbers of a run: counts first, rates from counts, and an interval for each rate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from scipy.special import bdtr

from rsplugins.attacks import masking
from rsplugins.certificate import Certificate, Claim, Guarantee
from rsplugins.runs.record import Record
from rsplugins.runs.rows import Row
from rsplugins.runs.together import check_together, read_labels

if TYPE_CHECKING:
    from rsplugins.runs.run import Run

_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ORDER = (Guarantee.DETERMINISTIC, Guarantee.PROBABILISTIC, Guarantee.ESTIMATE, Guarantee.EMPIRICAL, Guarantee.NONE)


def radius_grid(largest: float) -> list[float]:
    """Return the radii of a table's columns: 0, .25, .5, ... as long as that gives 3 to 10 of them, other steps when it does not.

    Example:
        >>> radius_grid(0.9), radius_grid(0.03)
        ([0.0, 0.25, 0.5, 0.75], [0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03])
    """
    if largest <= 0 or math.isinf(largest):
        return [0.0, 0.25, 0.5]
    step = next((step for step in _STEPS if largest / step < 10), largest / 9)
    if largest >= 0.5:
        step = max(step, 0.25)
    return [round(k * step, 6) for k in range(int(largest / step * (1 + 1e-9)) + 1)]


def certified_count(rows: Sequence[Row], radius: float) -> int:
    """Return how many inputs are classified correctly with at least this radius."""
    return sum(row.correct and row.radius >= radius for row in rows)


def average_radius(rows: Sequence[Row]) -> float:
    """Return the average certified radius over ALL inputs: 0 where the prediction is wrong, missing or failed."""
    return math.fsum(row.radius for row in rows if row.correct) / len(rows) if rows else 0.0


def interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a rate: what the rate over the data set's population may be.

    Example:
        >>> [round(bound, 4) for bound in interval(8, 10)]
        [0.4902, 0.9433]
    """
    if total == 0:
        return 0.0, 1.0
    rate, square = count / total, z * z
    centre = rate + square / (2 * total)
    half = z * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total))
    return max(0.0, (centre - half) / (1 + square / total)), min(1.0, (centre + half) / (1 + square / total))


def weakest(rows: Iterable[Row]) -> Guarantee | None:
    """Return the weakest guarantee among the claims; the whole run is labelled with it."""
    found = {row.claim.guarantee for row in rows if row.claim is not None}
    return max(found, key=_ORDER.index) if found else None


def records_sha256(records: Iterable[Record]) -> str:
    """Return a fingerprint of the records without their times, by index: equal for equal results."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.index):
        digest.update(record.to_json(provenance=False).encode() + b"\n")
    return digest.hexdigest()


@lru_cache(maxsize=64)
def summarise(run: Run) -> dict[str, Any]:
    """Return a run's summary, as ``summary.json`` holds it.

    Rates are over all inputs that have a record. ``curve`` gives, for each radius, the count and the rate of inputs that are
    classified correctly with at least that radius, and the 95 % interval of the rate. A run that does not verify certifies none,
    and has ``problems`` besides.
    """
    found = {
        "method": run.manifest.method,
        "model": run.manifest.model.get("reference"),
        "data": run.manifest.data.get("reference"),
        "imported": run.manifest.imported is not None,
        "dataset_alpha": (run.manifest.rescored or {}).get("dataset_alpha"),
        "sigma": run.manifest.parameters.get("sigma"),
        "n": run.manifest.parameters.get("n"),
        "missing": len(run.missing),
        **clean_numbers(run.rows, run.manifest.data.get("num_classes")),
        **_numbers(run.rows),
        **_attacks(run.rows, run.manifest.parameters),
        "records_sha256": records_sha256(row.record for row in run.rows),
    }
    # No summary.json has this: it is written for runs that verify.
    return found | {"certifies": False, "problems": list(run.problems)} if run.problems else found


def _attacks(rows: Sequence[Row], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracies under each attack of a run of attacks, and what they say of gradient masking."""
    first = next((row for row in rows if not row.failed), None)
    if first is None or "survived" not in first.record.evidence:
        return {}
    survived = [row.record.evidence.get("survived") for row in rows if not row.failed]
    names = [sorted(kept) if isinstance(kept, Mapping) else None for kept in survived]
    if not names or None in names or any(each != names[0] for each in names):
        return {}
    return {"attacks": asdict(masking.summarise(survived, int(parameters.get("steps", 0))))}  # type: ignore[arg-type]


def clean_numbers(rows: Sequence[Row], num_classes: int | None) -> dict[str, Any]:
    """Return the accuracy of the model without noise on the same inputs, and a doubt where it is at or below chance.

    Inputs that failed before the model saw them count as wrong, as they do in every rate. Nothing is said where a record that did
    not fail has no prediction, as in runs of earlier releases.
    """
    known = bool(rows) and all(_clean(row) is not None or row.failed for row in rows)
    if not known or all(_clean(row) is None for row in rows):
        return {}
    seen = [row for row in rows if _clean(row) is not None]
    right = sum(_clean(row) == row.record.label for row in seen)
    return {"clean_correct": right, "clean_accuracy": right / len(rows), "doubt": _doubt(right, len(seen), num_classes)}


def _clean(row: Row) -> int | None:
    """Return the model's class without noise: recorded beside a certifier's, or the very prediction of an attack or none."""
    if row.claim is not None and row.claim.guarantee in (Guarantee.EMPIRICAL, Guarantee.NONE) and row.record.clean is None:
        return row.prediction
    return row.record.clean


def _doubt(right: int, total: int, num_classes: int | None) -> str:
    if not num_classes or num_classes < 2:
        return ""
    below = float(bdtr(right, total, 1 / num_classes)) < 0.001
    if not below and (total < 30 or interval(right, total)[1] > 0.15):
        return ""
    where = "below chance" if below else "near zero"
    return (
        f"The model's clean accuracy is {where}: {right} of {total} inputs are right, where guessing among {num_classes} classes "
        f"gives {100 / num_classes:.3g} %. Likely causes: the classes are in another order than the model's outputs "
        "(--data-option classes=), the wrong mean and std, random weights, or a model of other data."
    )


def score(certificates: Sequence[Certificate], labels: Iterable[int], *, radii: Sequence[float] | None = None) -> dict[str, Any]:
    """Hold certificates against the true classes: accuracy, certified accuracy by radius, average certified radius.

    Args:
        certificates: from :func:`rsplugins.certify`, of one method.
        labels: the true class of each, in the same order; a tensor, an array or a list.
        radii: at which the certified accuracy is wanted; a grid by default.

    Returns:
        What ``summary.json`` of a run says of its results: ``accuracy``, ``acr`` (the average radius over all inputs, 0 where
        wrong, abstained or failed), ``abstained``, ``failed``, ``guarantee``, and ``curve``: for each radius the count and the
        rate of inputs that are right with at least that radius, with the rate's 95 % interval. ``certifies`` is false for
        estimates, whose numbers are no certified ones.

    Raises:
        ParameterError: labels that are no classes (their place is named), another number of them, or certificates whose radii
            cannot be added up: of several methods, norms, guarantees, models or settings, under different assumptions, or one
            input twice.

    Example:
        >>> from rsplugins.certificate import Certificate, Guarantee, Norm
        >>> found = [
        ...     Certificate(k, "ibp", 1, radius, Guarantee.DETERMINISTIC, Norm.LINF, None, 0, 0.0, {})
        ...     for k, radius in enumerate([0.5, 0.25])
        ... ]
        >>> result = score(found, [1, 0], radii=[0.25])
        >>> result["accuracy"], result["acr"], result["curve"][0]["rate"]
        (0.5, 0.25, 0.5)
    """
    check_together(certificates)
    classes = read_labels(labels, certificates)
    return _numbers([_row(one, label) for one, label in zip(certificates, classes, strict=True)], radii)


def _row(one: Certificate, label: int) -> Row:
    record = Record(one.index, label, one.evidence, one.samples, one.seconds, one.error)
    claim = Claim(one.prediction, one.radius, one.guarantee, one.norm, one.alpha, one.rule, one.assumptions)
    return Row(record, None if one.error is not None else claim)


def _numbers(rows: Sequence[Row], radii: Sequence[float] | None = None) -> dict[str, Any]:
    claims = [row.claim for row in rows if row.claim is not None]
    total = len(rows)
    guarantee = weakest(rows)
    correct = sum(row.correct for row in rows)
    abstained = sum(row.abstained for row in rows)
    return {
        "guarantee": None if guarantee is None else guarantee.value,
        "certifies": guarantee is not None and guarantee.certifies,
        "norm": claims[0].norm.value if claims else None,
        "alpha": max((claim.alpha for claim in claims if claim.alpha is not None), default=None),
        "inputs": total,
        "correct": correct,
        "accuracy": correct / total if total else 0.0,
        "accuracy_interval": list(interval(correct, total)),
        "abstained": abstained,
        "abstention_rate": abstained / total if total else 0.0,
        "failed": sum(row.failed for row in rows),
        "acr": average_radius(rows),
        "largest_radius": max((row.radius for row in rows if row.correct), default=0.0),
        "curve": _curve(rows, radii),
        "samples": sum(row.record.samples for row in rows),
        "seconds": math.fsum(row.record.seconds for row in rows),
        "rules": sorted({claim.rule for claim in claims}),
        "assumptions": sorted({text for claim in claims for text in claim.assumptions}),
    }


def _curve(rows: Sequence[Row], radii: Sequence[float] | None) -> list[dict[str, float]]:
    points = []
    for radius in radius_grid(max((row.radius for row in rows if row.correct), default=0.0)) if radii is None else radii:
        count = certified_count(rows, radius)
        low, high = interval(count, len(rows))
        points.append({"radius": radius, "count": count, "rate": count / len(rows) if rows else 0.0, "low": low, "high": high})
    return points
