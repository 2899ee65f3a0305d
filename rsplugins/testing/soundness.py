"""Whether claims are true: against worlds whose radius is known, and against each other.

Two sorts of false claims can be seen from outside. A claim whose class or radius is not that of the world's truth; and two claims
with different classes whose balls meet, of which one must be false, whatever function they are about. The first needs to know
what the claims are about, the second nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from rsplugins.certificate import Claim, Guarantee, Norm
from rsplugins.testing.known_radii import World
from rsplugins.testing.outcome import BrokenContractError, NotChecked, require
from rsplugins.testing.subject import Subject

TOLERANCE = 2e-6
"""On a radius: the model rounds in float32, and images are float32."""

CONFIDENCE = 0.999
"""Of the one-sided test: a certifier whose false rate is exactly alpha fails it once in a thousand."""

_ORDERS = {Norm.L1: 1, Norm.L2: 2, Norm.LINF: np.inf}


def false_claims(claims: Sequence[Claim], world: World) -> NDArray[np.bool_]:
    """Return which claims are false in a world whose truth they are about."""
    made = np.array([claim.prediction is not None and claim.radius > 0 for claim in claims])
    classes = np.array([-1 if claim.prediction is None else claim.prediction for claim in claims])
    radii = np.array([claim.radius for claim in claims])
    false: NDArray[np.bool_] = made & ((classes != world.classes) | (radii > world.radii * (1 + TOLERANCE) + TOLERANCE))
    return false


def contradictions(claims: Sequence[Claim], images: Tensor, norm: Norm) -> list[tuple[int, int]]:
    """Return disjoint pairs of claims that cannot both be true: different classes, and balls that meet.

    Each pair holds at least one false claim, so their number is a lower bound of the number of false claims.
    """
    made = [index for index, claim in enumerate(claims) if claim.prediction is not None and claim.radius > 0]
    points = images.flatten(1).double().numpy()
    free, pairs = set(made), []
    for first in sorted(made, key=lambda index: -claims[index].radius):
        if first not in free:
            continue
        others = [other for other in free if claims[other].prediction != claims[first].prediction]
        if not others:
            continue
        apart = np.linalg.norm(points[others] - points[first], ord=_ORDERS[norm], axis=1)
        reach = np.array([claims[other].radius for other in others]) + claims[first].radius
        meets = np.flatnonzero(apart * (1 + TOLERANCE) + TOLERANCE < reach)
        if len(meets):
            # The smallest ball that will do: it is of least use to others.
            second = min((others[at] for at in meets), key=lambda index: claims[index].radius)
            pairs.append((first, second))
            free -= {first, second}
    return pairs


def judge(subject: Subject, claims: Sequence[Claim], world: World) -> str:
    """Compare what was claimed in a world with what can be known, and return it in words.

    Raises:
        BrokenContractError: more claims are false than the guarantee allows.
    """
    made = sum(claim.prediction is not None and claim.radius > 0 for claim in claims)
    pairs = contradictions(claims, world.images, subject.norm)
    knows = subject.about == "classifier" or (subject.about == "smoothed" and world.symmetric)
    wrong = false_claims(claims, world) if knows else np.zeros(len(claims), dtype=bool)
    false = max(len(pairs), int(wrong.sum()))
    if subject.descriptor.guarantee not in (Guarantee.DETERMINISTIC, Guarantee.PROBABILISTIC):
        share = false / made if made else 0.0
        return f"measured: {false} of {made} estimates are too large or of the wrong class (optimism rate {share:.3f})"
    alpha = max((claim.alpha or 0.0 for claim in claims), default=0.0)
    allowed = int(stats.binom.ppf(CONFIDENCE, len(claims), alpha)) if alpha else 0
    if false > allowed:
        raise BrokenContractError(
            f"{false} of {len(claims)} claims are false; at {_promise(alpha)} at most {allowed} may be. "
            f"{_example(claims, world, wrong, pairs)}"
        )
    trials = f"in {len(claims)} trials: {false} false, {allowed} allowed at {_promise(alpha)}"
    return f"{made} certificates {trials}"


def _promise(alpha: float) -> str:
    return f"alpha={alpha:g}" if alpha else "a deterministic guarantee"


def _example(claims: Sequence[Claim], world: World, wrong: NDArray[np.bool_], pairs: Sequence[tuple[int, int]]) -> str:
    if wrong.any():
        radii = np.array([claim.radius for claim in claims])
        worst = int(np.argmax(np.where(wrong, radii - world.radii, -np.inf)))
        return (
            f"Input {worst}: class {claims[worst].prediction} within {claims[worst].radius:.6g}; the truth is class "
            f"{world.classes[worst]} within {world.radii[worst]:.6g}."
        )
    first, second = pairs[0]
    one, two = claims[first], claims[second]
    return (
        f"Inputs {first} and {second} are certified as classes {one.prediction} and {two.prediction} in balls that meet "
        f"(radii {one.radius:.6g} and {two.radius:.6g})."
    )


def check_world(subject: Subject, world: World, *, n: int, alpha: float, n0: int = 100) -> str:
    """Certify a world's images and judge the claims.

    Raises:
        BrokenContractError: more claims are false than the guarantee allows.
        NotChecked: the certifier refuses such a classifier.
    """
    settings = subject.settings(n=n, n0=n0, alpha=alpha)
    refusal = subject.accepts(world.classifier, settings)
    if refusal:
        raise NotChecked(f"refused: {refusal}")
    claims = [claim for _, claim in subject.run(world.classifier, world.images, settings)]
    for claim in claims:
        require(claim.norm is subject.norm, f"the claim is in {claim.norm}, the contract asked for {subject.norm}")
    return judge(subject, claims, world)
