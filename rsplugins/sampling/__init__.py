"""The sampling engine: the only place that draws noise.

A certifier writes, for each input, a small generator (a *program*) that asks for samples and ends with evidence::

    def program():
        selection = yield Draw(0, n0)            # samples 0 .. n0-1 of this input
        estimation = yield Draw(n0, n0 + n)      # fresh samples
        return {"selection": selection.votes(), "estimation": estimation.votes()}

The engine runs many programs at once and fills every micro-batch across them.
"""

from rsplugins.sampling.engine import Sampler, check_independent
from rsplugins.sampling.grid_noise import IntegerNoise, check_on_grid, gaussian_noise, grid_evidence
from rsplugins.sampling.noise import GaussianNoise, NoiseSource, block_seed
from rsplugins.sampling.program import Draw, Program, Tally

__all__ = [
    "Draw",
    "GaussianNoise",
    "IntegerNoise",
    "NoiseSource",
    "Program",
    "Sampler",
    "Tally",
    "block_seed",
    "check_independent",
    "check_on_grid",
    "gaussian_noise",
    "grid_evidence",
]
