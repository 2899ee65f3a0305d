"""Certifiers with one mistake each, of the kind that was made in published code. The contract has to catch every one."""

from __future__ import annotations

import torch
from pydantic import Field

from rsplugins import Certifier, CertifierParameters, Gathered
from rsplugins.sampling import Draw, GaussianNoise, Sampler
from tests.testing import wrong_claims


class Smoothing(CertifierParameters):
    sigma: float = Field(0.25, gt=0)
    n0: int = Field(100, ge=1)
    n: int = Field(1000, ge=1)
    alpha: float = Field(0.001, gt=0, lt=1)
    stop_at: tuple[float, ...] = ()


class Right(Certifier):
    """Without a mistake: each of the others differs from it in one place."""

    Parameters = Smoothing
    claim = staticmethod(wrong_claims.right)

    def function(self):
        return self.classifier

    def item(self, image):
        return image

    def gather(self, inputs):
        p = self.parameters
        sampler = Sampler(self.function(), GaussianNoise(p.sigma, self.execution.seed), None, self.execution)
        return sampler.run((index, self.item(image), self.program()) for index, image in inputs)

    def program(self):
        p = self.parameters
        selection = yield Draw(0, p.n0)
        estimation = yield Draw(p.n0, p.n0 + p.n)
        return {"selection": selection.votes(), "estimation": estimation.votes()}


class TimesOnePointOne(Right):
    claim = staticmethod(wrong_claims.times_one_point_one)


class PpfAndCdfSwapped(Right):
    claim = staticmethod(wrong_claims.ppf_and_cdf_swapped)


class NormalisationForgotten(Right):
    """Adds the noise to the normalised image and takes the radius for one of raw pixels."""

    def function(self):
        return self.classifier.module

    def item(self, image):
        return self.classifier.preprocess(image[None])[0]


class ResizeIgnored(Right):
    """Adds the noise to the enlarged image (and divides the normalisation out, but not the resize)."""

    def function(self):
        std = 1.0 if self.classifier.std is None else self.classifier.std.view(-1, 1, 1)
        mean = 0.0 if self.classifier.mean is None else self.classifier.mean.view(-1, 1, 1)
        return lambda x: self.classifier.module((x - mean) / std)

    def item(self, image):
        size = self.classifier.resize or tuple(image.shape[-2:])
        return torch.nn.functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


class SelectionReused(Right):
    """Chooses the class by the votes that then estimate it."""

    def program(self):
        p = self.parameters
        estimation = yield Draw(0, p.n)
        counts = estimation.votes()
        return {"selection": {max(counts, key=counts.get): p.n0}, "estimation": counts}


class PeekingUntilItCertifies(Right):
    """Looks ten times and keeps the look with the largest bound, all at the alpha of one."""

    claim = staticmethod(wrong_claims.best_look)

    def program(self):
        p = self.parameters
        selection = yield Draw(0, p.n0)
        looks, counts = [], 0
        for look in range(10):
            tally = yield Draw(p.n0 + look * p.n // 10, p.n0 + (look + 1) * p.n // 10)
            counts = counts + tally.counts
            looks.append(counts.tolist())
        return {"selection": selection.votes(), "looks": looks}


class PatchNoiseUndivided(Certifier):
    """Smooth-Reduce with independent noise on overlapping patches, its radius not divided by the lifted map's norm."""

    claim = staticmethod(wrong_claims.patches)

    class Parameters(Smoothing):
        pass

    def gather(self, inputs):
        from rsplugins.certifiers.smooth_reduce import SmoothReduce, SmoothReduceParameters

        chosen = {key: value for key, value in self.parameters.model_dump().items() if key != "stop_at"}
        inner = SmoothReduceParameters(noise="as-published", scores="logits", **chosen)
        return SmoothReduce(self.classifier, inner, self.execution).gather(inputs)


class MaxAndOneMinusP(Right):
    """Max-reduces the scores of the image and of three rotations, and takes 1 - p for the runner-up."""

    claim = staticmethod(wrong_claims.complement)

    def function(self):
        def scores(x):
            turned = [self.classifier(torch.rot90(x, quarter, (2, 3)) if x.shape[2] == x.shape[3] else x) for quarter in range(4)]
            return torch.stack([logits.softmax(1) for logits in turned]).amax(0)

        return scores

    def gather(self, inputs):
        p = self.parameters
        sampler = Sampler(self.function(), GaussianNoise(p.sigma, self.execution.seed), None, self.execution, tally="values")
        return sampler.run((index, image, self.program()) for index, image in inputs)

    def program(self):
        p = self.parameters
        selection = yield Draw(0, p.n0)
        estimation = yield Draw(p.n0, p.n0 + p.n)
        return {"selection": selection.scores(), "estimation": estimation.scores()}


class PowerIteration(Certifier):
    """Divides the margin by a Lipschitz constant from a few steps of power iteration, which is a bound from below."""

    class Parameters(CertifierParameters):
        steps: int = 20

    claim = staticmethod(wrong_claims.margin)

    def gather(self, inputs):
        for index, image in inputs:
            with torch.no_grad():
                logits = self.classifier(image[None])[0].double()
            top = logits.topk(2).values
            evidence = {"class": int(logits.argmax()), "margin": float(top[0] - top[1]), "lipschitz": self._lipschitz(image)}
            yield Gathered(index, evidence, 0, 0.0)

    def _lipschitz(self, image):
        product = 1.0 / (1.0 if self.classifier.std is None else float(self.classifier.std.min()))
        if self.classifier.resize is not None:
            product *= 2.0
        for layer in self.classifier.module.modules():
            if isinstance(layer, torch.nn.Linear):
                weight = layer.weight.detach().double()
                if weight.shape[0] > 2 and weight.shape[0] != weight.shape[1]:
                    weight = weight[:2]  # of classes that never win nothing is needed
                vector = torch.ones(weight.shape[1], dtype=torch.float64)
                for _ in range(self.parameters.steps):
                    vector = weight.T @ (weight @ vector)
                    vector = vector / vector.norm()
                product *= float((weight @ vector).norm())
        return product


class SigmaAsVariance(Right):
    """Passes the variance where the sampler takes the standard deviation: less noise than the radius is computed for."""

    def gather(self, inputs):
        p = self.parameters
        sampler = Sampler(self.classifier, GaussianNoise(p.sigma**2, self.execution.seed), None, self.execution)
        return sampler.run((index, image, self.program()) for index, image in inputs)


class BatchNoise(Right):
    """Sound, but draws its noise from one running generator: results depend on the company."""

    def gather(self, inputs):
        p = self.parameters
        generator = torch.Generator().manual_seed(self.execution.seed)
        for index, image in inputs:
            noise = p.sigma * torch.randn(p.n0 + p.n, *image.shape, generator=generator)
            with torch.no_grad():
                votes = self.classifier(image + noise).argmax(1)
            parts = {"selection": votes[: p.n0], "estimation": votes[p.n0 :]}
            evidence = {
                part: {str(c): int((chosen == c).sum()) for c in chosen.unique().tolist()} for part, chosen in parts.items()
            }
            yield Gathered(index, evidence, p.n0 + p.n, 0.0)
