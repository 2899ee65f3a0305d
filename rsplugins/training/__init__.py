"""Training: a trainer with hooks, and the methods of the field as hooks.

The trainer is run by ``rsplugins train RECIPE.toml``; the hooks work in anybody's loop::

    from rsplugins.training import Gairat, Hooks

    hooks = Hooks(Gairat(eps=8 / 255, lambda_=-1.0, burn_in=30), epochs=100)
    ...
        loss = hooks.training_loss(model, images, labels, epoch=epoch)
"""

from __future__ import annotations

from rsplugins.attacks.pgd import Geometry
from rsplugins.data.streamed import StreamedTable
from rsplugins.data.table import ImageTable
from rsplugins.training.adversarial import AdversarialTraining, FriendlyAdversarialTraining, Mart, Trades
from rsplugins.training.bounding import EtbReleasedTraining, EtbTraining, IbpTraining, SoundEtbTraining
from rsplugins.training.covariance import CovarianceTraining
from rsplugins.training.gairat import (
    Gairat,
    GairFat,
    GairMart,
    GairTrades,
    GeometryWeights,
    MailAt,
    MailTrades,
    MarginWeights,
)
from rsplugins.training.hooks import Batch, Hooks, Start, TrainingHookSpecs, hookimpl
from rsplugins.training.recipe import Recipe, load_recipe
from rsplugins.training.smoothing import Consistency, GaussianAugmentation, LatentNoise, Macer
from rsplugins.training.trainer import Trainer, TrainingDivergedError, TrainingResult

__all__ = [
    "AdversarialTraining",
    "Batch",
    "Consistency",
    "CovarianceTraining",
    "EtbReleasedTraining",
    "EtbTraining",
    "FriendlyAdversarialTraining",
    "GairFat",
    "GairMart",
    "GairTrades",
    "Gairat",
    "GaussianAugmentation",
    "Geometry",
    "GeometryWeights",
    "Hooks",
    "IbpTraining",
    "ImageTable",
    "LatentNoise",
    "Macer",
    "MailAt",
    "MailTrades",
    "MarginWeights",
    "Mart",
    "Recipe",
    "SoundEtbTraining",
    "Start",
    "StreamedTable",
    "Trades",
    "Trainer",
    "TrainingDivergedError",
    "TrainingHookSpecs",
    "TrainingResult",
    "hookimpl",
    "load_recipe",
]
