"""Small networks whose moments the tests know or can sample."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A block with batch normalisation, a strided branch with groups, and a projection."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.branch, self.skip = nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.Conv2d(4, 4, 1, 2)
        self.head, self.activation = nn.Linear(4, 3), activation
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)

    def forward(self, x):
        y = self.activation(self.norm(self.stem(x)))
        y = self.activation(self.branch(y) + self.skip(y))
        return self.head(y.mean((2, 3)))


class Identity(nn.Module):
    """x + F(x) with an activation: the skip connection is the input of the branch itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = torch.relu(self.a(x.flatten(1)))
        return self.head(y + torch.relu(self.b(y)))


class Joined(nn.Module):
    """Concatenation of a node and an activation of it, a view, constants added, multiplied and subtracted."""

    def __init__(self, activation=torch.relu):
        super().__init__()
        self.a, self.head, self.activation = nn.Conv2d(2, 2, 1), nn.Linear(4 * 36, 3), activation

    def forward(self, x):
        y = 0.5 * self.a(x)
        y = torch.cat([y, self.activation(y)], 1)
        return 1.0 - self.head(y.view(y.size(0), -1)) / 2.0


def identity(x):
    return x


NETWORKS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "pool": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)),
    "gelu": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "residual": Residual,
    "joined": Joined,
}
LINEAR = {
    "residual": lambda: Residual(identity),
    "joined": lambda: Joined(identity),
    "pooled": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(16, 3)),
    "dilated": lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 2), (1, 2), (2, 1), dilation=2), nn.Flatten(), nn.LazyLinear(3)),
}
SIZE = (2, 6, 6)


def make(builders, name):
    torch.manual_seed(7)
    network = builders[name]().double().eval()
    network(torch.zeros(1, *SIZE, dtype=torch.float64))  # lazy layers learn their sizes
    return network
