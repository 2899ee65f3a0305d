"""What masked predictions prove of a defended classifier; imports no torch.

Evidence of one input, as :mod:`rsplugins.certifiers.patch_cleanser` gathers it::

    {"image": [H, W], "side": 2, "rows": [[0, 4], [2, 6]], "columns": [[0, 4], [2, 6]],
     "one": [predictions of the images with one mask, row by row],
     "two": {mask: [predictions of the images with that mask and each mask]}, "pairs": [...] or a class}

``two`` holds the masks whose prediction is not the majority's. Where all one-masked predictions agree it is empty, and ``pairs``
holds those of two different masks, row by row of the upper triangle; one number where all are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rsplugins.certificate import Claim, Evidence, Guarantee, Threat
from rsplugins.patches.masks import covers

ASSUMPTION = "of the defended model, whose class is that of the masked images' vote; of one square patch anywhere in the image"


def majority(one: Sequence[int]) -> int:
    """Return the most frequent class; of several the smallest.

    Example:
        >>> majority([2, 1, 2, 1, 0])
        1
    """
    counts = Counter(one)
    return min(counts, key=lambda label: (-counts[label], label))


def defended(one: Sequence[int], two: Mapping[str, Sequence[int]]) -> int:
    """Return the class of the defended model: double masking, algorithm 1 of the paper.

    Example:
        >>> defended([0, 0, 1, 0], {"2": [1, 1, 1, 1]}), defended([0, 0, 1, 0], {"2": [0, 1, 1, 1]})
        (1, 0)
    """
    most = majority(one)
    for place, label in enumerate(one):
        if label != most and all(found == label for found in two[str(place)]):
            return label
    return most


def patch_cleanser(evidence: Evidence, parameters: Mapping[str, Any]) -> Claim:
    r"""Whether the defended model gives one class whatever one patch shows.

    Theorem (Xiang, Mahloujifar, Mittal 2022): if every image with two masks, equal ones included, gets class c, then the defended
    model outputs c for every image that differs in one patch. Proof: let :math:`m^*` cover the patch; an image with
    :math:`m^*` and any other mask m shows clean pixels alone, and gets c. A mask with another prediction than c has c among its
    second predictions (beside :math:`m^*`), so it never decides; if the majority is not c, then :math:`m^*` disagrees with it and
    all its second predictions are c, so c is output.

    Args:
        evidence: see the module.
        parameters: of the certifier.

    Returns:
        The claim; its radius is the side of the patch in pixels when that is proven, else 0. Masks that leave a patch uncovered
        prove nothing.

    Example:
        >>> masks = {"image": [6, 6], "side": 2, "rows": [[0, 4], [2, 6]], "columns": [[0, 4], [2, 6]]}
        >>> claim = patch_cleanser({**masks, "one": [3, 3, 3, 3], "two": {}, "pairs": 3}, {})
        >>> claim.prediction, claim.radius, str(claim.norm)
        (3, 2.0, 'patch')
        >>> patch_cleanser({**masks, "one": [3, 3, 3, 3], "two": {}, "pairs": [3, 3, 3, 0, 3, 3]}, {}).radius
        0.0
    """
    one, side = evidence["one"], evidence["side"]
    prediction = defended(one, evidence["two"])
    count = len(one)
    pairs = evidence.get("pairs")
    pairs = [pairs] * (count * (count - 1) // 2) if isinstance(pairs, int) else pairs
    complete = len(evidence["rows"]) * len(evidence["columns"]) == count
    covered = all(
        covers(evidence[axis], length, side) for axis, length in zip(("rows", "columns"), evidence["image"], strict=True)
    )
    alike = pairs is not None and len(pairs) == count * (count - 1) // 2 and {*one, *pairs} == {prediction}
    proven = complete and covered and alike
    return Claim(
        prediction,
        float(side) if proven else 0.0,
        Guarantee.DETERMINISTIC,
        Threat.PATCH,
        None,
        "patch-cleanser/xiang-2022",
        (ASSUMPTION,),
    )
