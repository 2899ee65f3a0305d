"""What each representation needs, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rsplugins.errors import ParameterError

COMFORT = 12 * 2**20
"""Up to so many bytes an input ``full`` is taken without being asked for: beyond, it is slow."""

_TEMPORARIES = 6  # square matrices of an activation's size that its exact covariance needs at once


def estimate(sizes: Sequence[tuple[int, int]], inputs: int, *, rank: int, width: int = 8) -> dict[str, int]:
    """Return about how many bytes one input needs at most, by representation, from the most accurate to the smallest.

    Args:
        sizes: numbers before and after every step; see :attr:`rsplugins.moments.network.MomentNetwork.sizes`.
        inputs: numbers in one input.
        rank: of ``low-rank``.
        width: bytes of a number.

    Example:
        >>> {name: round(size / 2**20, 1) for name, size in estimate([(784, 500), (500, 500), (500, 10)], 784, rank=64).items()}
        {'full': 19.1, 'low-rank': 1.4, 'channel': 0.1}
    """
    full = max(before * before + before * after + _TEMPORARIES * after * after for before, after in sizes)
    largest = max(before + after for before, after in sizes)
    kept = inputs + sum(after for _, after in sizes)
    return {
        "full": width * max(full, inputs * inputs),
        "low-rank": width * (2 * min(rank, inputs) * largest + 12 * kept),
        "channel": width * 8 * largest,
    }


def choose(needs: Mapping[str, int], wanted: str, limit: int) -> str:
    """Return the representation to use, ``wanted`` or for ``"auto"`` the most accurate one that is comfortable.

    Raises:
        ParameterError: when the wanted one does not fit; names what it needs and what fits.
    """
    if wanted == "auto":
        if needs["full"] <= min(limit, COMFORT):
            return "full"
        wanted = "low-rank" if needs["low-rank"] <= limit else "channel"
    needed = needs.get(wanted, needs["channel"])
    if needed > limit:
        fitting = [name for name, size in needs.items() if size <= limit]
        raise ParameterError(
            f"The representation {wanted!r} needs about {in_words(needed)} for one input; the limit is {in_words(limit)}.",
            cause="it keeps the covariance of every pair of activations." if wanted == "full" else "the network is large.",
            fix=f"Use representation={fitting[0]!r} ({in_words(needs[fitting[0]])}), or raise memory_gib."
            if fitting
            else "Raise memory_gib.",
        )
    return wanted


def in_words(size: int) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> in_words(3 * 2**20), in_words(5 * 2**30)
        ('3 MiB', '5 GiB')
    """
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
