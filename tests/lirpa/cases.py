"""Small networks with weights that depend on no random number generator, and points that try to leave their bounds."""

import itertools
import math

import torch
from torch import nn

from rsplugins.certificate import Norm

D = torch.float64


def settle(module, seed=0):
    """Fill every tensor with He-sized numbers from a generator of our own; running variances stay positive. In place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator, dtype=D)
        fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
        values = drawn * math.sqrt(2 / fan_in) if tensor.dim() > 1 else 0.2 * drawn
        if name.endswith("running_var"):
            values = drawn.square() + 0.5
        tensor.copy_(values)
    return module.to(D).eval()


class Residual(nn.Module):
    """Two convolutions with batch normalisation around a skip, average pooling, a view, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.outer = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        y = (y + self.outer(self.inner(y).relu())).relu()
        y = nn.functional.avg_pool2d(y, 3)
        return self.head(y.view(y.size(0), -1))


def mlp(*sizes, bias=True):
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn():
    """Strided, padded, grouped, with and without bias, batch normalisation before a ReLU, a last layer without bias."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (2, 3), padding=(1, 0), groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, (3, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 5, bias=False),
    )


NETWORKS = {"mlp": lambda: mlp(2 * 36, 20, 15, 10, 5), "cnn": cnn, "residual": Residual}


def in_ball(x, eps, norm, count, seed=2):
    """Points of the ball around x (1, ...), most of them on its surface or at its corners: (count, ...)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, x.numel())
    if norm is Norm.LINF:
        inside = torch.rand(shape, generator=generator, dtype=D) * 2 - 1
        inside[: count // 2] = inside[: count // 2].sign()
    elif norm is Norm.L2:
        inside = torch.randn(shape, generator=generator, dtype=D)
        inside = inside / inside.norm(dim=1, keepdim=True)
    else:
        where = torch.randint(x.numel(), (count, 1), generator=generator)
        sign = torch.randint(2, (count, 1), generator=generator).to(D) * 2 - 1
        inside = torch.zeros(shape, dtype=D).scatter(1, where, sign)
    return x + eps * inside.view(-1, *x.shape[1:])


def attack(module, x, eps, norm, direction, steps=15):
    """Projected gradient ascent of direction @ logits over the ball around x (1, ...); every iterate, (steps, ...)."""
    point, found = x.clone(), []
    for step in range(steps):
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((module(point) * direction).sum(), point)
        size = 2 * eps / (1 + step)
        if norm is Norm.LINF:
            moved = (point + size * gradient.sign()).detach()
            point = x + (moved - x).clamp(-eps, eps)
        elif norm is Norm.L2:
            moved = (point + size * gradient / gradient.norm().clamp(min=1e-12)).detach() - x
            point = x + moved * min(1.0, eps / max(float(moved.norm()), 1e-12))
        else:
            best = gradient.abs().flatten().argmax()
            point = (
                x + torch.zeros_like(x).flatten().index_fill(0, best, eps).view_as(x) * gradient.flatten()[best].sign()
            ).detach()
        found.append(point.detach())
    return torch.cat(found)


def reached(module, x, eps, norm, count=400):
    """Outputs of the network on points of the ball, random ones and attacked ones in every output's direction."""
    points = [x, in_ball(x, eps, norm, count)]
    for output in range(module(x).shape[1]):
        direction = torch.eye(module(x).shape[1], dtype=x.dtype)[output]
        points += [attack(module, x, eps, norm, direction), attack(module, x, eps, norm, -direction)]
    with torch.no_grad():
        return module(torch.cat(points))
