"""The certifier ``uniform-l1``: votes under uniform noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor

from rsplugins import Certifier, CertifierParameters, Classifier, Execution, Gathered, Input
from rsplugins.sampling import Draw, Program, Sampler, block_seed


class UniformNoise:
    """Uniform on [-scale, scale], a function of (seed, input index, sample index) alone."""

    name = "uniform-v1"

    def __init__(self, scale: float, seed: int) -> None:
        self.scale, self.seed = scale, seed

    def perturb(self, image: Tensor, out: Tensor, index: int, start: int) -> None:
        """Write image + noise of samples ``start`` onwards into the rows of ``out``."""
        generator = torch.Generator(out.device)
        for row in range(len(out)):
            generator.manual_seed(block_seed(self.seed, index, start + row))
            noise = torch.empty(image.shape, dtype=out.dtype, device=out.device)
            out[row] = image + noise.uniform_(-self.scale, self.scale, generator=generator)


class Parameters(CertifierParameters):
    """What the user may set."""

    lambda_: float = Field(0.5, gt=0, description="half the width of the noise, on raw [0, 1] pixels")
    n0: int = Field(100, ge=1, description="selection samples")
    n: int = Field(10_000, ge=1, description="estimation samples")
    alpha: float = Field(0.001, gt=0, lt=1, description="probability of a false certificate, for one input")


class UniformL1(Certifier[Parameters]):
    """Certified l1 radii from majority votes under uniform noise."""

    Parameters = Parameters

    def __init__(self, classifier: Classifier, parameters: Parameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        noise = UniformNoise(parameters.lambda_, execution.seed)
        self.sampler = Sampler(classifier, noise, classifier.num_classes, execution)

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield votes of separate selection and estimation samples."""
        return self.sampler.run((index, image, self._program()) for index, image in inputs)

    def _program(self) -> Program:
        n0, n = self.parameters.n0, self.parameters.n
        selection = yield Draw(0, n0)
        estimation = yield Draw(n0, n0 + n)
        return {"selection": selection.votes(), "estimation": estimation.votes()}
