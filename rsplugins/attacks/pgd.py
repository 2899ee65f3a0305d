"""Projected gradient descent in the l-infinity ball, vectorised, with the geometry of GAIRAT counted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.attacks.inputs import check_images, full, hard
from rsplugins.attacks.inputs import cross_entropy as _cross_entropy

Objective = Callable[[Tensor, Tensor], Tensor]
"""From logits (n, K) and the indices (n,) of these inputs in the batch to a scalar that the attack increases."""


@dataclass(frozen=True)
class Geometry:
    """How far each input is from the decision boundary, counted in attack steps.

    Attributes:
        first: (B,) the least number of steps after which the iterate is misclassified, ``steps`` if never (Zhang et al. 2021).
        correct: (B,) how many of the iterates x_0 .. x_{steps-1} are classified correctly (the released code). The two differ
            where a prediction flips back.
        steps: K.
    """

    first: Tensor
    correct: Tensor
    steps: int


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back as it was at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cross_entropy(labels: Tensor) -> Objective:
    """Return the summed cross-entropy with labels (B,), or soft labels (B, K)."""
    return lambda logits, index: _cross_entropy(logits, labels[index], "sum")


def margin(labels: Tensor) -> Objective:
    """Return the summed margin max_{k != y} z_k - z_y (Carlini and Wagner 2017), which no rescaling of the logits blinds."""

    def objective(logits: Tensor, index: Tensor) -> Tensor:
        own = labels[index][:, None]
        others = logits.scatter(1, own, -torch.inf)
        return (others.amax(1) - logits.gather(1, own)[:, 0]).sum()

    return objective


def divergence(logits: Tensor) -> Objective:
    """Return the summed KL(p || q) from the clean distribution p = softmax(logits), (B, K), to the perturbed q (TRADES)."""
    clean = F.softmax(full(logits.detach()), dim=1)
    return lambda scores, index: F.kl_div(F.log_softmax(scores, dim=1), clean[index], reduction="sum")


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    objective: Objective | None = None,
    stop_after: int | None = None,
    check: bool = True,
) -> tuple[Tensor, Geometry]:
    """Ascend the objective by signed gradient steps inside the l-infinity ball and [0, 1], with the model in eval mode.

    Args:
        model: raw [0, 1] pixels to logits (B, K).
        images: (B, C, H, W), raw [0, 1] pixels.
        labels: (B,) int64, or soft labels (B, K), of which the most probable class counts as the right one.
        eps: radius, raw pixels.
        step_size: raw pixels.
        steps: K.
        start: (B, C, H, W) offset of the first iterate x_0; None starts at the images.
        objective: None for the cross-entropy with ``labels``.
        stop_after: None runs all steps. A number tau stops each input tau steps after its first misclassified iterate (Zhang et
            al. 2020, "friendly" adversarial training); every input keeps its place in the batch.
        check: whether the images' values are checked, which waits for the device.

    Returns:
        The last iterates (B, C, H, W), detached, and the :class:`Geometry`.

    Raises:
        InputValueError: images outside [0, 1], to which the iterates are clamped; with the likely cause.
    """
    if check:
        check_images(images, model)
    objective = objective or cross_entropy(labels)
    labels = hard(labels)
    current = images.detach().clone()
    if start is not None:
        current = _project(current + start, images, eps)
    first = torch.full((len(images),), steps, dtype=torch.long, device=images.device)
    correct = torch.zeros_like(first)
    spare = None if stop_after is None else torch.full_like(first, stop_after)
    index = torch.arange(len(images), device=images.device)
    with evaluation_mode(model):
        for step in range(steps):
            iterate = current[index].requires_grad_()
            with torch.enable_grad():
                logits = full(model(iterate))
                (gradient,) = torch.autograd.grad(objective(logits, index), iterate)
            right = logits.detach().argmax(1) == labels[index]
            correct[index] += right.long()
            first[index] = torch.where(right, first[index], first[index].clamp(max=step))
            moved = _project(iterate.detach() + step_size * gradient.sign(), images[index], eps)
            if spare is None:
                current = moved
                continue
            go_on = right | (spare[index] > 0)
            spare[index] -= (~right).long()
            index = index[go_on]
            current[index] = moved[go_on]
            if len(index) == 0:
                break
    return current, Geometry(first=first, correct=correct, steps=steps)


def _project(candidate: Tensor, images: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(candidate, images - eps), images + eps).clamp(0.0, 1.0)
