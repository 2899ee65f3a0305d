"""The heavy half of the tiny plugin."""

from __future__ import annotations

import time

import tiny_claims
import torch
from pydantic import Field

from rsplugins import Certifier, CertifierParameters, Gathered, wrap
from rsplugins.data import Dataset


def load_model(reference, *, scale: float = 1.0):
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 3)
    linear.weight.data *= scale
    return wrap(torch.nn.Sequential(torch.nn.Flatten(), linear), input_size=(3, 2, 2), source=f"tiny:{reference}")


def load_data(reference="tiny", *, root=None, split="test", input_size=None):
    count = int(reference) if reference.isdigit() else 40
    images = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = load_model("x")(images).argmax(1)
    labels[::4] = 0
    return Dataset(
        name="tiny", split=split, labels=labels.tolist(), num_classes=3, input_size=(3, 2, 2), read=lambda index: images[index]
    )


@torch.no_grad()
def exact(classifier, image):
    """Class and distance to the decision boundary of a linear model."""
    logits = classifier(image[None])[0].double()
    weight = classifier.module[1].weight.double()
    first = int(logits.argmax())
    distances = [float((logits[first] - logits[k]) / (weight[first] - weight[k]).norm()) for k in range(3) if k != first]
    return first, min(distances)


class Votes(Certifier):
    """One-sided smoothing of a linear model, its votes drawn from the exact binomial."""

    claim = staticmethod(tiny_claims.votes)

    class Parameters(CertifierParameters):
        sigma: float = Field(0.25, gt=0)
        n: int = Field(1000, ge=1)
        alpha: float = Field(0.001, gt=0, lt=1)
        delay: float = 0.0
        stop_at: tuple[float, ...] = ()

    def gather(self, inputs):
        for index, image in inputs:
            started = time.perf_counter()
            time.sleep(self.parameters.delay)
            first, margin = exact(self.classifier, image)
            p = torch.special.ndtr(torch.tensor(margin / self.parameters.sigma, dtype=torch.float64))
            generator = torch.Generator().manual_seed(self.execution.seed * 1_000_003 + index)
            count = int((torch.rand(self.parameters.n, generator=generator, dtype=torch.float64) < p).sum())
            evidence = {"class": first, "count": count}
            yield Gathered(index, evidence, self.parameters.n, time.perf_counter() - started)


class Margin(Certifier):
    """The exact radius; input 13 fails."""

    claim = staticmethod(tiny_claims.margin)

    def gather(self, inputs):
        for index, image in inputs:
            first, margin = exact(self.classifier, image)
            if index == 13:
                yield Gathered(index, {}, 1, 0.001, error="unlucky")
            else:
                yield Gathered(index, {"class": first, "margin": margin}, 1, 0.001)


class Guess(Margin):
    claim = staticmethod(tiny_claims.guess)

    class Parameters(CertifierParameters):
        factor: float = 2.0


class Breaks(Certifier):
    claim = staticmethod(tiny_claims.margin)

    def gather(self, inputs):
        for index, _ in inputs:
            if index >= 2:
                raise ZeroDivisionError("planned")
            yield Gathered(index, {"class": 0, "margin": 0.1}, 1, 0.0)
