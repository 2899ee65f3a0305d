"""Bounds of the installed release against numbers that release 0.7.1 gave (and 0.3 gives): ``golden_bounds.json``.

``python tests/lirpa/test_releases.py`` writes the file anew with the release that it finds.
"""

import json
from pathlib import Path

import pytest
import torch

from rsplugins.certificate import Norm
from rsplugins.lirpa.etb import ETB, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import NETWORKS, D, settle

GOLDEN = Path(__file__).with_name("golden_bounds.json")
METHODS = {
    "ibp": (None, "ibp"),
    "crown-ibp": (None, "crown-ibp"),
    "crown": (None, "crown"),
    "etb": (ETB, "ibp"),
    "sound-etb": (SOUND_ETB, "ibp"),
}
CASES = [f"{network} {method} {norm}" for network in NETWORKS for method in METHODS for norm in ("linf", "l2", "l1")]


def margins(case):
    network, method, norm = case.split()
    operators, propagation = METHODS[method]
    images = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(5), dtype=D)
    rows = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(6), dtype=D)
    bounds = BoundNetwork(settle(NETWORKS[network](), seed=7), images, operators=operators)
    low, high = bounds.bounds(images, 0.05, norm=Norm(norm), method=propagation, specification=rows)
    return [low.detach().tolist(), high.detach().tolist()]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_other_release(case):
    expected = json.loads(GOLDEN.read_text())["bounds"][case]
    torch.testing.assert_close(torch.tensor(margins(case)), torch.tensor(expected), atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    from rsplugins.compat import bridge_auto_lirpa

    release = bridge_auto_lirpa().__version__
    content = {case: [[[round(value, 8) for value in row] for row in side] for side in margins(case)] for case in CASES}
    GOLDEN.write_text(json.dumps({"auto_LiRPA": release, "bounds": content}, indent=None, separators=(",", ":")) + "\n")
