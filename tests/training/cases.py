"""Small models and data with known answers, shared by the training tests."""

from __future__ import annotations

import torch
from torch import nn

from rsplugins.training import ImageTable
from rsplugins.training.recipe import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)


class TwoClassLinear(nn.Module):
    """Logits (0, w.x + b): class 1 where w.x + b > 0; the l-infinity distance to the boundary is |w.x + b| / ||w||_1."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def small_net(seed: int = 0, classes: int = 3, batch_norm: bool = False) -> nn.Module:
    """A convolutional network for (B, 1, 4, 4) images."""
    torch.manual_seed(seed)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))


def batch(size: int = 6, classes: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 4, 4, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def table(size: int = 40, seed: int = 2) -> ImageTable:
    """Images whose class is the brightest of three rows: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(size, 1, 4, 4, generator=generator)
    labels = torch.arange(size) % 3
    images[torch.arange(size), 0, labels] += 0.6
    return ImageTable((images * 255).round().to(torch.uint8), labels, 3)


def recipe(**training: object) -> Recipe:
    settings = {"epochs": 3, "batch_size": 8, **training}
    return Recipe(
        name="test",
        data=DataSettings(name="digits", flip=True),
        model=ModelSettings(architecture="digits_cnn", mean=(0.3,), std=(0.25,)),
        training=TrainingSettings(**settings),  # type: ignore[arg-type]
        optimizer=OptimizerSettings(lr=0.05),
    )
