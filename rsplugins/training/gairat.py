"""Geometry-aware instance-reweighted adversarial training (Zhang et al., ICLR 2021) and MAIL (Wang et al., NeurIPS 2021).

Trainers, not certifiers: nothing here gives a certificate, and PGD accuracy alone flatters these methods (METHODS: AutoAttack on
GAIRAT models is far below PGD). Judge them with ``rsplugins attack``.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor
from torch.nn import functional as F

from rsplugins.attacks import pgd
from rsplugins.attacks.inputs import full
from rsplugins.errors import ParameterError
from rsplugins.parameters import Flag, NonNegative, Number, Positive, Settings, Whole, number, settings
from rsplugins.training.adversarial import AdversarialTraining, FriendlyAdversarialTraining, Mart, Trades, kl
from rsplugins.training.hooks import Batch, Start, hookimpl
from rsplugins.training.instance_weights import Scheme, geometry_weights, margin_weights


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("a number, or inf for equal weights")
    return value


Lambda = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(number), AfterValidator(_no_nan)]
"""A number, or inf for equal weights."""


@settings
class _Late(Settings):
    """Weights that start after a burn-in.

    Attributes:
        burn_in: first epoch, counted from 0, in which inputs are weighted; before it all weights are 1.
    """

    burn_in: Whole = 0

    @hookimpl
    def on_start(self, start: Start) -> None:
        """Refuse a burn-in that never ends."""
        if start.epochs is not None and self.burn_in >= start.epochs:
            raise ParameterError(
                f"burn_in is {self.burn_in} and the run has {start.epochs} epochs, so no input would ever be reweighted.",
                fix="The papers use 30 of 100 and 60 of 120 epochs; scale burn_in to the run.",
            )


@settings
class GeometryWeights(_Late):
    """GAIRAT's instance weights, on top of any hook whose attack counts the geometry.

    Attributes:
        lambda_: larger is closer to equal weights; -1 for GAIRAT and 0 for GAIR-FAT in the paper, inf recovers the plain method.
        scheme: ``"tanh"``, ``"sigmoid"`` or ``"discrete"``; see :func:`~rsplugins.training.instance_weights.geometry_weights`.
        kappa: ``"first"``, the least number of steps to a misclassified iterate (the paper); or ``"correct"``, the number of
            correctly classified iterates (the released code).
        normalise: whether weights have mean 1 over the batch; under torchrun, over each process's share of it.
        schedule: ``"fixed"``; ``"linear"`` falls from lambda_max at the end of burn-in to lambda_ in the last epoch; ``"steps"``
            takes the values of ``lambda_steps``.
        lambda_max: finite; where ``"linear"`` starts.
        lambda_steps: pairs (first epoch, lambda) of ``"steps"``, in increasing order.
    """

    soft_labels: ClassVar[bool] = False

    lambda_: Lambda = -1.0
    scheme: Scheme = "tanh"
    kappa: Literal["first", "correct"] = "first"
    normalise: Flag = True
    schedule: Literal["fixed", "linear", "steps"] = "fixed"
    lambda_max: Number = 3.0
    lambda_steps: tuple[tuple[Whole, Lambda], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (self.lambda_, *(value for _, value in self.lambda_steps)):
            if value == -math.inf:
                raise ParameterError("lambda is -inf, which gives every input weight 0.", fix="Use a finite lambda, or inf.")
        if self.schedule == "linear" and math.isinf(self.lambda_):
            raise ParameterError("A linear schedule cannot end at an infinite lambda_.", fix="Use a finite lambda_.")
        epochs = [epoch for epoch, _ in self.lambda_steps]
        if (self.schedule == "steps") != bool(epochs) or epochs != sorted(set(epochs)):
            raise ParameterError(
                f"lambda_steps is {self.lambda_steps} with schedule {self.schedule!r}.",
                fix='Write schedule = "steps" and lambda_steps = [[60, -1.0], [90, -2.0]], epochs increasing.',
            )

    def lambda_at(self, epoch: int, epochs: int | None) -> float:
        """Return lambda in an epoch counted from 0 of a run of ``epochs``; inf during burn-in."""
        if epoch < self.burn_in:
            return math.inf
        if self.schedule == "steps":
            return next((value for start, value in reversed(self.lambda_steps) if epoch >= start), math.inf)
        if self.schedule == "fixed":
            return self.lambda_
        if epochs is None:
            raise ParameterError("A linear lambda schedule needs the length of the run.", fix="Pass Hooks(..., epochs=N).")
        progress = (epoch - self.burn_in) / max(1, epochs - 1 - self.burn_in)
        return self.lambda_max + min(1.0, progress) * (self.lambda_ - self.lambda_max)

    @hookimpl
    def instance_weights(self, batch: Batch) -> Tensor | None:
        """Return the weights, or None while lambda is infinite, so that burn-in is the plain method bit for bit."""
        lambda_ = self.lambda_at(batch.epoch, batch.epochs)
        if (math.isinf(lambda_) and self.scheme != "discrete") or batch.epoch < self.burn_in:
            return None
        if batch.geometry is None:
            raise ParameterError(
                "Geometry weights need an attack that counts steps, and no hook of this run attacks.",
                fix='Add [[hooks]] name = "at", or use name = "gairat", which attacks and reweights.',
            )
        kappa = getattr(batch.geometry, self.kappa)
        batch.metrics["kappa"] = kappa.float().mean()
        return geometry_weights(kappa, batch.geometry.steps, lambda_, self.scheme, normalise=self.normalise)


@settings
class Gairat(GeometryWeights, AdversarialTraining):
    """GAIRAT: AT with geometry weights."""


@settings
class GairFat(GeometryWeights, FriendlyAdversarialTraining):
    """GAIR-FAT: FAT with geometry weights. Inputs keep their places, so labels and images cannot come apart."""

    lambda_: Lambda = 0.0


@settings
class GairMart(GeometryWeights, Mart):
    """GAIR-MART, by our definition: the paper's code has none. Geometry weights multiply both terms of MART's loss."""


@settings
class GairTrades(GeometryWeights, Trades):
    """GAIR-TRADES as in the released semi-supervised code: w KL on TRADES' images and 1 - w on margin-attack images.

    Loss: CE(f(x), y) + beta mean_i [w_i KL(p(x_i) || p(x_i')) + (1 - w_i) KL(p(x_i) || p(x_i''))], x'' from PGD on the margin, w
    not normalised.
    """

    lambda_: Lambda = 3.0
    scheme: Scheme = "tanh-rst"
    kappa: Literal["first", "correct"] = "correct"
    normalise: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise:
            raise ParameterError(
                "GAIR-TRADES shares each input between two attacks as w and 1 - w, so w must stay below 1.",
                fix="Leave normalise out.",
            )

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the GAIR-TRADES objective; that of TRADES while there are no weights."""
        if weights is None:
            return super().loss(batch, None)
        geometry = batch.geometry
        second = self._pgd(batch, self.small_start(batch), pgd.margin(batch.labels), None)
        batch.geometry = geometry
        perturbed, by_margin, clean = batch.logits, full(batch.model(second)), full(batch.model(batch.images))
        robust = weights * kl(clean, perturbed) + (1.0 - weights) * kl(clean, by_margin)
        return F.cross_entropy(clean, batch.labels) + self.beta * robust.mean()


@settings
class MarginWeights(_Late):
    """MAIL's instance weights from the probability margin of the adversarial images.

    Attributes:
        slope: steepness of the sigmoid.
        bias: shift of the margin.
        normalise: whether weights have mean 1 over the batch; the released code leaves them.
    """

    soft_labels: ClassVar[bool] = False

    slope: Positive = 10.0
    bias: Number = -0.5
    normalise: Flag = False

    @hookimpl
    def instance_weights(self, batch: Batch) -> Tensor | None:
        """Return the weights, or None during burn-in."""
        if batch.epoch < self.burn_in:
            return None
        return margin_weights(batch.logits, batch.labels, slope=self.slope, bias=self.bias, normalise=self.normalise)


@settings
class MailAt(MarginWeights, AdversarialTraining):
    """MAIL-AT: AT with margin weights."""


@settings
class MailTrades(MarginWeights, Trades):
    """MAIL-TRADES: TRADES with margin weights on the KL term."""

    slope: Positive = 2.0
    bias: Number = 0.0
    beta: NonNegative = 5.0
