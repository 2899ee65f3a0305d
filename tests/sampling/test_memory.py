import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, resource
from rsplugins.certifier import Execution
from rsplugins.sampling import Draw, GaussianNoise, Sampler
torch.set_num_threads(1)

def program(n):
    tally = yield Draw(0, n)
    return tally.votes()

weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
sampler = Sampler(lambda x: x @ weight, GaussianNoise(1.0, 0), 2, Execution(batch_size=1000), tally=sys.argv[2])
done = list(sampler.run([(0, torch.ones(16), program(int(sys.argv[1])))]))
assert done[0].samples == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(n, tally):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n), tally], capture_output=True, text=True, check=True, timeout=600
    )
    return int(finished.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("tally", ["votes", "scores"])
def test_peak_memory_does_not_grow_with_n(tally):
    pytest.importorskip("resource")
    few, many = peak(1_000, tally), peak(1_000_000, tally)
    assert many <= 1.05 * few
