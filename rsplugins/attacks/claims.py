"""Claims of the methods ``attack`` and ``predict``: pure functions of the evidence, without torch. Neither certifies anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsplugins.certificate import Claim, Evidence, Guarantee, Norm


def attack(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of ``attack``: the class without an attack, and the radius ``eps`` where every attack failed.

    Args:
        evidence: ``"prediction"``, and ``"survived"``: by attack, ``"clean"`` among them, whether the class was
            still the true one.
        parameters: ``eps``, l-infinity on raw [0, 1] pixels.

    Raises:
        ValueError: the evidence is not of that form.

    Example:
        >>> attack({"prediction": 3, "survived": {"clean": True, "pgd": False}}, {"eps": 0.1}).radius
        0.0
    """
    survived = evidence["survived"]
    if not survived or any(not isinstance(kept, bool) for kept in survived.values()):
        raise ValueError("survived is no truth value an attack")
    names = ", ".join(name for name in survived if name != "clean")
    radius = float(parameters["eps"]) if all(survived.values()) else 0.0
    only = ("survived these attacks only",)
    return Claim(_class(evidence), radius, Guarantee.EMPIRICAL, Norm.LINF, None, f"attacked by {names}", only)


def predict(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    """The claim of ``predict``: the model's class, and no radius.

    Example:
        >>> said = predict({"prediction": 3}, {})
        >>> said.prediction, said.radius, str(said.guarantee)
        (3, 0.0, 'none')
    """
    return Claim(_class(evidence), 0.0, Guarantee.NONE, Norm.L2, None, "prediction")


def _class(evidence: Evidence) -> int:
    prediction = evidence["prediction"]
    if type(prediction) is not int or prediction < 0:
        raise ValueError(f"prediction is {prediction!r}, which is no class")
    return prediction
