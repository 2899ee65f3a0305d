"""Half-space worlds: classifiers whose true radius is known, and the check that certificates are false no more often than alpha.

The noise direction that matters is one-dimensional. Class 0 holds a half-space that the noise hits with probability p; beyond
it the runner-up holds a share w of the mass and the other classes the rest. Moving by r across the boundary leaves class 0 with
Phi(d - r), d = Phi^-1(p), and the runner-up with w (1 - Phi(d - r)), so the top class changes at r = d - Phi^-1(w / (1 + w)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

SIGMA = 0.5


@dataclass(frozen=True)
class World:
    p: float
    classes: int
    w: float
    n: int
    alpha: float
    repeats: int
    n0: int = 30

    @property
    def probabilities(self) -> np.ndarray:
        rest = 1 - self.p
        others = [] if self.classes == 2 else [rest * (1 - self.w) / (self.classes - 2)] * (self.classes - 2)
        return np.array([self.p, rest * self.w, *others])

    def true_radii(self) -> np.ndarray:
        """The largest radius at which each class is on top; 0 for a class that is not on top."""
        signed = SIGMA * (stats.norm.ppf(self.p) - stats.norm.ppf(self.w / (1 + self.w)))
        return np.array([max(signed, 0.0), max(-signed, 0.0)] + [0.0] * (self.classes - 2))

    def true_class(self) -> int:
        return 0 if self.p >= self.probabilities[1] else 1


def worlds(repeats: int, *, ns=(50, 500, 5000), alphas=(0.05, 0.01, 0.001)) -> Iterator[World]:
    """Worlds across p, n, alpha and the number of classes; most are ties or near-ties, where a mistake shows."""
    shapes = [
        (0.5, 2, 1.0),
        (0.5, 10, 0.98),
        (0.35, 3, 0.5),
        (0.2, 10, 0.2),
        (0.6, 2, 1.0),
        (0.9, 3, 1.0),
        (0.99, 10, 0.5),
        (0.999, 2, 1.0),
    ]
    for alpha in alphas:
        for n in ns:
            for p, classes, w in shapes:
                yield World(p, classes, w, n, alpha, repeats)


Certify = Callable[[World, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""(world, coins) -> predictions (-1 for an abstention) and radii, one of each per repeat."""


def false_certificates(world: World, predictions: np.ndarray, radii: np.ndarray) -> int:
    made = predictions >= 0
    wrong = (predictions != world.true_class()) | (radii > world.true_radii()[np.maximum(predictions, 0)])
    return int((made & wrong).sum())


def check_false_rate(certify: Certify, chosen: list[World], seed: int = 0) -> dict[str, float]:
    """Assert that certificates are false at a rate of at most alpha, by one-sided binomial tests at 99.9 %.

    Tested for each alpha over all worlds, and for each world (where one bad world would drown in many easy ones) with the 0.1 %
    shared out among the worlds.
    """
    rng = np.random.default_rng(seed)
    totals: dict[float, list[int]] = {}
    for world in chosen:
        false = false_certificates(world, *certify(world, rng))
        assert false <= stats.binom.ppf(1 - 0.001 / len(chosen), world.repeats, world.alpha), f"{false} false in {world}"
        total = totals.setdefault(world.alpha, [0, 0])
        total[0], total[1] = total[0] + false, total[1] + world.repeats
    for alpha, (false, repeats) in totals.items():
        assert false <= stats.binom.ppf(0.999, repeats, alpha), f"{false} false of {repeats} at alpha={alpha}"
    return {str(alpha): false / repeats for alpha, (false, repeats) in totals.items()}


def select(world: World, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(world.n0, world.probabilities, size=world.repeats).argmax(axis=1)


def votes_for(world: World, chosen: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Fresh votes for the chosen class of each repeat."""
    return rng.binomial(n, world.probabilities[chosen])


def tabulate(function: Callable[[int], float], counts: np.ndarray) -> np.ndarray:
    """Apply a function of an integer to an array of many equal integers, once for each value."""
    values, where = np.unique(counts, return_inverse=True)
    return np.array([function(int(value)) for value in values])[where].reshape(counts.shape)


def or_abstain(chosen: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(radii > 0, chosen, -1), radii


def bound_at_looks(bound, votes: np.ndarray, totals: np.ndarray, alpha: float) -> np.ndarray:
    """Bounds of votes, shape (repeats, looks), computed once for each pair of a count and a look that occurs."""
    pairs = votes * len(totals) + np.arange(len(totals))
    values, where = np.unique(pairs, return_inverse=True)
    return bound(values // len(totals), totals[values % len(totals)], alpha)[where].reshape(votes.shape)
