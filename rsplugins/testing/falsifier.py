"""A search for counterexamples: attacks inside certified balls of a small trained network."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.certificate import Claim, Guarantee, Norm
from rsplugins.classifier import Classifier, wrap
from rsplugins.testing.outcome import BrokenContractError, NotChecked
from rsplugins.testing.soundness import CONFIDENCE
from rsplugins.testing.subject import Subject

_COPIES = 8  # noisy copies behind each gradient of a smoothed classifier


@functools.cache
def small_network(sigma: float) -> tuple[Classifier, Tensor]:
    """Train a small network on the embedded digits under noise, and return it with the test images; takes a second.

    Args:
        sigma: of the Gaussian noise it is trained under.
    """
    from rsplugins.data.digits import load

    train, test = load(split="train"), load()
    pairs = [train[index] for index in range(len(train))]
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs]).float()
    labels = torch.tensor([label for _, label in pairs])
    generator = torch.Generator().manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for name, (width_in, width_out) in {"first": (64, 48), "second": (48, 10)}.items():
        layer = nn.Linear(width_in, width_out)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(width_in**-0.5), width_in**-0.5, generator=generator)
        layers += [(name, layer)] if name == "second" else [(name, layer), ("relu", nn.ReLU())]
    network = nn.Sequential(OrderedDict(layers))
    weights = list(network.parameters())
    speed = [torch.zeros_like(weight) for weight in weights]
    for _ in range(150):  # by hand: importing torch.optim takes longer than this
        batch = torch.randint(len(images), (128,), generator=generator)
        noise = sigma * torch.randn(images[batch].shape, generator=generator)
        loss = F.cross_entropy(network(images[batch] + noise), labels[batch])
        for weight, moved, gradient in zip(weights, speed, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.1 * moved.mul_(0.9).add_(gradient)
    shown = torch.stack([torch.as_tensor(test[index][0]) for index in range(0, len(test), 4)]).float()
    return wrap(network, input_size=(1, 8, 8), source="a small network trained on the digits"), shown


def attack(
    classifier: Classifier,
    images: Tensor,
    classes: Tensor,
    radii: Tensor,
    norm: Norm,
    *,
    sigma: float,
    steps: int = 30,
    seed: int = 0,
) -> Tensor:
    """Return images inside the balls (and the [0, 1] box) on which the class does as badly as projected ascent can make it.

    Args:
        classifier: raw pixels to logits.
        images: (N, C, H, W), the centres.
        classes: (N,) what is attacked.
        radii: (N,) of the balls.
        norm: of the radii.
        sigma: attack the mean margin under Gaussian noise; 0 attacks the classifier itself.
        steps: of ascent, after a random start.
        seed: of the start and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = radii.view(-1, 1).float()
    start = torch.randn(images.flatten(1).shape, generator=generator)
    delta = _project(start * limit / 4, limit, norm)
    copies = _COPIES if sigma else 1
    for step in range(steps):
        delta = delta.requires_grad_(True)
        points = (images.flatten(1) + delta).view(images.shape).repeat(copies, 1, 1, 1)
        noisy = points + sigma * torch.randn(points.shape, generator=generator) if sigma else points
        logits = classifier(noisy)
        own = logits.gather(1, classes.repeat(copies)[:, None])[:, 0]
        others = logits.scatter(1, classes.repeat(copies)[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad((others - own).sum(), delta)
        size = limit * (1.0 if step < steps // 2 else 0.25)
        delta = _project((delta + size * _ascent(gradient, norm)).detach(), limit, norm)
        delta = (images.flatten(1) + delta).clamp(0, 1) - images.flatten(1)  # shrinks it in every norm: the centre is in the box
    return (images.flatten(1) + delta).view(images.shape).detach()


def _ascent(gradient: Tensor, norm: Norm) -> Tensor:
    if norm is Norm.LINF:
        return gradient.sign()
    if norm is Norm.L2:
        unit: Tensor = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-20)
        return unit
    best = gradient.abs().argmax(1, keepdim=True)
    return torch.zeros_like(gradient).scatter(1, best, gradient.gather(1, best).sign())


def _project(delta: Tensor, limit: Tensor, norm: Norm) -> Tensor:
    if norm is Norm.LINF:
        return torch.minimum(torch.maximum(delta, -limit), limit)
    length = delta.norm(p=1 if norm is Norm.L1 else 2, dim=1, keepdim=True)
    shrunk: Tensor = delta * (limit / length.clamp_min(1e-20)).clamp_max(1.0)
    return shrunk


def falsify(subject: Subject, *, images: int, n: int, alpha: float) -> str:
    """Attack inside certified balls of a small trained network.

    A claim about the Classifier itself is false when the attack changes its class. A claim about a smoothed function is
    contradicted when the certifier itself certifies another class where the attack ended.

    Raises:
        BrokenContractError: more claims fall than the guarantee allows.
        NotChecked: the certifier refuses the network.
    """
    settings = subject.settings(n=n, n0=100, alpha=alpha)
    sigma = float(settings.get("sigma", 0.25)) if subject.about != "classifier" else 0.0
    classifier, shown = small_network(sigma or 0.1)
    refusal = subject.accepts(classifier, settings)
    if refusal:
        raise NotChecked(f"refused: {refusal}")
    points = shown[:images]
    claims = [claim for _, claim in subject.run(classifier, points, settings)]
    chosen = [index for index, claim in enumerate(claims) if claim.prediction is not None and claim.radius > 0]
    if not chosen:
        raise NotChecked(f"none of {len(claims)} digits was certified")
    targets = torch.tensor([claims[index].prediction for index in chosen])
    radii = torch.tensor([claims[index].radius for index in chosen]) * (1 - 1e-5)
    found = attack(classifier, points[chosen], targets, radii, subject.norm, sigma=sigma)
    if subject.about == "classifier":
        with torch.inference_mode():
            fallen = int((classifier(found).argmax(1) != targets).sum())
    else:
        offset = range(len(shown), len(shown) + len(found))  # other indices, other noise
        there = [claim for _, claim in subject.run(classifier, found, settings, indices=offset)]
        fallen = sum(
            claim.prediction is not None and claim.radius > 0 and claim.prediction != int(target)
            for claim, target in zip(there, targets, strict=True)
        )
    return _verdict(subject, claims, fallen, len(chosen))


def _verdict(subject: Subject, claims: Sequence[Claim], fallen: int, attacked: int) -> str:
    if subject.descriptor.guarantee not in (Guarantee.DETERMINISTIC, Guarantee.PROBABILISTIC):
        return f"measured: {fallen} of {attacked} estimates fell to the attack (optimism rate at least {fallen / attacked:.3f})"
    alpha = max((claim.alpha or 0.0 for claim in claims), default=0.0)
    # Of two claims that contradict each other either may be the false one.
    allowed = int(stats.binom.ppf(CONFIDENCE, attacked, min(1.0, 2 * alpha))) if alpha else 0
    if fallen > allowed:
        raise BrokenContractError(f"{fallen} of {attacked} certified digits change class inside their balls; {allowed} may.")
    mean = float(np.mean([claim.radius for claim in claims]))
    return f"{attacked} balls attacked (mean radius {mean:.3g}), {fallen} of {attacked} fell, {allowed} allowed"
