"""What a set of bounds has to withstand before any of it is trusted: the network itself, at points drawn from one ball."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rsplugins.certificate import Norm
from rsplugins.double import bring
from rsplugins.lirpa.diagnosis import NotBoundedError
from rsplugins.machine.device import is_out_of_memory

EPS = (0.0, 0.001, 0.01, 0.1)
"""Radii that are probed, on raw pixels: the point itself, balls where bounds are tight, one where activations bend."""

_POINTS, _ROWS, _CHUNK = 128, 16, 32
_PIXELS = 2**19
"""Of all points of one ball together: of larger images fewer are drawn, since each is a forward pass in float64."""
_WEIGHTS = 2**28
"""Weights that all points of one ball together are multiplied with, counted once a point: larger networks get fewer points."""
_FEWEST, _FEWEST_ROWS = 2, 2
# Of rounding, relative to the outputs; a wrong operator is off by orders of magnitude more.
_ROUNDING = {torch.float64: 1e-6}
_LOOSENESS = {torch.float64: 1e-3}

Forward = Callable[[Tensor], Tensor]
Bounds = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images (B, ...), eps (B,), specification (B, S, K)) -> lower and upper bounds of specification @ logits, (B, S)."""


def probe(
    forward: Forward,
    bounds: Bounds,
    example: Tensor,
    norm: Norm,
    *,
    method: str,
    estimate: bool = False,
    halved: bool = False,
    plain: Bounds | None = None,
    weights: int = 0,
) -> None:
    """Compare bounds around one drawn image with what the network does there. Deterministic; leaves global generators alone.

    At eps = 0 the bounds have to be the logits, but for their rounding. At the other radii of :data:`EPS` they have to contain
    the outputs at corners of the ball, at points within, and where each logit's gradient points.

    Args:
        forward: (B, ...) -> (B, K), the model as it is deployed, in the dtype of ``example``.
        bounds: what is probed.
        example: (1, ...), for shape, dtype and device.
        norm: of the ball.
        method: for the message.
        estimate: the bounds claim to hold in expectation only, so that just eps = 0 is compared.
        halved: a radius and a row at a time, to save memory.
        plain: the bounds as floating point gives them, where those that are probed are rounded outward: asked for when the
            latter are wide at eps = 0, which may be their rounding alone.
        weights: of the network: how many it has.

    Raises:
        ParameterError: the bounds contradict the network.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(example.shape, generator=generator, dtype=torch.float64)
    # Every ball of EPS stays in [0, 1], where models are defined.
    image = bring(0.25 + 0.5 * drawn, example.device, example.dtype)
    with torch.no_grad():
        logits = forward(image)
    most = _ROWS if image.numel() * _POINTS <= _PIXELS else _FEWEST_ROWS
    rows = torch.linspace(0, logits.shape[1] - 1, 1 if halved else min(most, logits.shape[1])).round().long().to(logits.device)
    matrix = torch.eye(logits.shape[1], device=logits.device, dtype=logits.dtype)[rows]
    radii = EPS[:1] if estimate else EPS
    widths: list[Tensor] = []
    for part in [(eps,) for eps in radii] if halved else [radii]:
        found = bounds(*_questions(image, matrix, part))
        low, high = (bound.detach() for bound in found)
        for i, eps in enumerate(part):
            points = image if eps == 0 else _points(forward, image, rows, eps, norm, generator, weights)
            reached = torch.cat([output[:, rows] for output in _outputs(forward, points)])
            if not _holds(low[i], high[i], reached):
                raise _wrong(method, eps, norm)
            widths.append(high[i] - low[i])
    scale = logits.abs().max()
    if _is_loose(widths, scale):
        low, high = (plain or bounds)(*_questions(image, matrix, radii[:1]))
        if _is_loose([(high - low).detach()[0]], scale):
            raise _wrong(method, 0.0, norm)


def _questions(image: Tensor, matrix: Tensor, radii: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    count = len(radii)
    images = image.expand(count, *image.shape[1:]).contiguous()
    return images, torch.tensor(radii, dtype=image.dtype), matrix.expand(count, *matrix.shape).contiguous()


def _holds(low: Tensor, high: Tensor, reached: Tensor) -> bool:
    scale = reached.abs().max()
    rounding = _ROUNDING.get(reached.dtype, 1e-3)
    # What is not finite certifies nothing, and comparisons with it are False.
    broken = (reached < low - rounding * (scale + low.abs())) | (reached > high + rounding * (scale + high.abs()))
    return not bool(broken.any())


def _is_loose(widths: list[Tensor], scale: Tensor) -> bool:
    """Whether bounds at eps = 0 are wide by themselves: more than rounding makes them, which grows with the others' width."""
    loose = widths[0] > _LOOSENESS.get(scale.dtype, 1e-2) * scale
    if len(widths) > 1:
        loose &= widths[0] > widths[-1] / 2
    return bool(loose.any())


def _outputs(forward: Forward, points: Tensor) -> Iterator[Tensor]:
    with torch.no_grad():
        for part in torch.split(points, _CHUNK):
            yield forward(part)


def _points(
    forward: Forward, image: Tensor, rows: Tensor, eps: float, norm: Norm, generator: torch.Generator, weights: int
) -> Tensor:
    """Draw points of the ball, half of them on its boundary, and add where the gradients of some logits point: (N, ...)."""
    size = image.numel()
    count = max(_FEWEST, min(_POINTS, _PIXELS // size, _WEIGHTS // max(weights, 1)))
    drawn = bring(torch.randn(count, size, generator=generator, dtype=torch.float64), image.device, image.dtype)
    steepest = _gradients(forward, image, rows)
    directions = _on_boundary(torch.cat([drawn, steepest, -steepest]), norm)
    shorter = torch.rand(count // 2, 1, generator=generator, dtype=torch.float64)
    directions[: count // 2] *= bring(shorter, image.device, image.dtype)
    if norm is Norm.LINF:
        inside = 2 * torch.rand(count // 2, size, generator=generator, dtype=torch.float64) - 1
        directions[: count // 2] = bring(inside, image.device, image.dtype)
    # A hair inside, so that rounding does not carry a point over the boundary.
    return image + (1 - 1e-6) * eps * directions.view(-1, *image.shape[1:])


def _on_boundary(directions: Tensor, norm: Norm) -> Tensor:
    if norm is Norm.LINF:
        return torch.sign(directions)
    if norm is Norm.L2:
        lengths: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        return directions / lengths.clamp(min=torch.finfo(directions.dtype).tiny)
    largest = directions.abs().argmax(1, keepdim=True)
    return torch.zeros_like(directions).scatter(1, largest, directions.gather(1, largest).sign())


def _gradients(forward: Forward, image: Tensor, rows: Tensor) -> Tensor:
    with torch.enable_grad():
        x = image.detach().clone().requires_grad_(True)
        outputs = forward(x)[0, rows]
        if not outputs.requires_grad:
            return x.detach().flatten(1)[:0]
        try:
            found = [torch.autograd.grad(output, x, retain_graph=True, allow_unused=True)[0] for output in outputs]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return x.detach().flatten(1)[:0]  # a write in place over what the gradient needs: the other points have to do
    return torch.stack([torch.zeros_like(x) if gradient is None else gradient for gradient in found]).flatten(1).nan_to_num()


def _wrong(method: str, eps: float, norm: Norm) -> NotBoundedError:
    seen = "are not the network's logits at eps = 0" if eps == 0 else f"miss outputs that it has within {norm} distance {eps:g}"
    return NotBoundedError(
        f"The bounds of this network by {method} are wrong: they {seen}. Nothing was certified.",
        cause="an operator of auto-LiRPA, or of a plugin, is wrong for a layer of this network or for one of its options.",
        fix="Use another method (ibp asks least of a layer), or build the model from Linear, Conv2d, BatchNorm2d, ReLU, Flatten "
        "and additions.",
    )
