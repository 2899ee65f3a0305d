"""Training with bounds as hooks: IBP, ETB and sound ETB, with eps schedules and mixing weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rsplugins.attacks.inputs import full
from rsplugins.errors import ParameterError
from rsplugins.parameters import Eps, Flag, Fraction, NonNegative, Positive, Settings, settings
from rsplugins.training.chain_bounds import Blocks, Bound, Bounder, Chain, make_bounder
from rsplugins.training.hooks import Batch, Start, hookimpl


@settings
class IbpTraining(Settings):
    """IBP training (Gowal et al., ICCV 2019): share * CE(f(x), y) + (1 - share) * CE(worst-case logits, y).

    The worst-case logits are bounds of the margins against the label over the l-infinity ball. During ``warmup`` epochs only the
    clean loss counts; over the next ``ramp`` epochs eps grows from 0 and the share goes from 1 to ``clean_share``, both linearly.

    Attributes:
        eps: final radius, raw [0, 1] pixels.
        warmup: epochs.
        ramp: epochs.
        clean_share: final weight of the clean loss.
        clip: intersect the ball with the pixel range.
    """

    soft_labels: ClassVar[bool] = False

    bound: ClassVar[Bound] = "ibp"

    eps: Eps
    warmup: NonNegative = 0.0
    ramp: NonNegative = 0.0
    clean_share: Fraction = 0.5
    clip: Flag = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bounder: Bounder | None = None

    @hookimpl
    def on_start(self, start: Start) -> None:
        """Refuse schedules that never reach eps."""
        if start.epochs is not None and self.warmup + self.ramp >= start.epochs:
            spent = self.warmup + self.ramp
            raise ParameterError(
                f"warmup and ramp take {spent:g} epochs and the run has {start.epochs}, so eps is never reached.",
                fix="Shorten them, or train longer.",
            )

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the mixed objective."""
        self.bounder(batch)
        clean = F.cross_entropy(batch.logits, batch.labels)
        grown = self.grown(batch.progress)
        batch.metrics["eps"] = clean.new_tensor(self.eps * grown)
        if grown == 0.0:
            return clean
        share = 1.0 - (1.0 - self.clean_share) * grown
        return share * clean + (1.0 - share) * self.robust(batch, self.eps * grown)

    def grown(self, progress: float) -> float:
        """Return the share of eps in use after ``progress`` epochs, from 0 to 1."""
        if progress < self.warmup:
            return 0.0
        return min(1.0, (progress - self.warmup) / self.ramp) if self.ramp > 0 else 1.0

    def robust(self, batch: Batch, eps: float) -> Tensor:
        """Return the cross-entropy of the worst-case logits."""
        return self.robust_by(batch, eps, self.bound)

    def robust_by(self, batch: Batch, eps: float, bound: Bound) -> Tensor:
        """Return the cross-entropy of the worst-case logits under one of the bounds."""
        specification = against(batch.labels, batch.logits.shape[1]).to(batch.logits.dtype)
        low = full(self.bounder(batch).lower(batch.images, eps, specification, bound, self.clip))
        # Margins against the other classes all positive; the label's own row is 0.
        batch.metrics[f"within_{bound}"] = (low.detach().scatter(1, batch.labels[:, None], 1.0) > 0).all(1).float().mean()
        return F.cross_entropy(-low, batch.labels)

    def bounder(self, batch: Batch) -> Bounder:
        """Return what bounds the model, made at the first step."""
        if self._bounder is None:
            self._bounder = make_bounder(batch.model, batch.images, ("ibp",))
        return self._bounder


@settings
class SoundEtbTraining(IbpTraining):
    """Training with sound ETB bounds, ours: IBP training with bounds that are never wider.

    Attributes:
        ibp_share: how much of the robust loss is that of plain interval bounds.
        blocks: which pairs of layers are bounded as one: ``"linear"``, two linear layers, at about the price of IBP; ``"mixed"``
            also a convolution and a linear layer (10 times as slow on an MNIST network); ``"all"`` also two convolutions (100
            times).
    """

    bound: ClassVar[Bound] = "sound-etb"

    ibp_share: Fraction = 0.0
    blocks: Blocks = "linear"

    def bounder(self, batch: Batch) -> Bounder:
        """Return what bounds the model, made at the first step."""
        if self._bounder is None:
            self._bounder = make_bounder(batch.model, batch.images, ("ibp", self.bound), blocks=self.blocks)
        return self._bounder

    def robust(self, batch: Batch, eps: float) -> Tensor:
        """Return the mixed robust loss."""
        own = 0.0 if self.ibp_share == 1 else self.robust_by(batch, eps, self.bound)
        interval = 0.0 if self.ibp_share == 0 else self.robust_by(batch, eps, "ibp")
        return torch.as_tensor((1.0 - self.ibp_share) * own + self.ibp_share * interval)


@settings
class EtbTraining(SoundEtbTraining):
    """Training with blockwise expected tight bounds, which are not sound: a surrogate that certified bounds may follow.

    ``ibp_share`` between 0 and 1 gives the mixture a * IBP + (1 - a) * ETB, in the manner of MTL-IBP.
    """

    bound: ClassVar[Bound] = "etb"


@settings
class EtbReleasedTraining(IbpTraining):
    """ETB training as in the released code: CE(f(x), y) + factor * CE(z / (T max|z|), y), for chains only.

    z_j = f_j(x) + o_j for j != y and z_y = f_y(x) - o_y, with o the deviations under one masked Jacobian of the whole network.
    The scaling keeps logits within 1/T, so the second term does not go to 0: its value cannot be compared with IBP's.

    Attributes:
        factor: weight of the bound's loss.
        temperature: T.
    """

    factor: Positive = 1.0
    temperature: Positive = 1.0
    clip: Flag = False

    @hookimpl
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the objective."""
        logits, grown = batch.logits, self.grown(batch.progress)
        clean = F.cross_entropy(logits, batch.labels)
        if grown == 0.0:
            return clean
        chain = self.bounder(batch)
        if not isinstance(chain, Chain):
            raise ParameterError(
                "The released ETB needs a chain of convolutions, linear layers and ReLUs.", fix='Use name = "etb".'
            )
        offsets = chain.offsets(batch.images, self.eps * grown, self.clip).to(logits.dtype)
        sign = torch.ones_like(offsets).scatter(1, batch.labels[:, None], -1.0)
        z = logits + sign * offsets
        # All logits 0 would divide by 0.
        scaled = z / (self.temperature * z.abs().amax(1, keepdim=True).clamp_min(1e-12))
        return clean + self.factor * F.cross_entropy(scaled, batch.labels)


def against(labels: Tensor, classes: int) -> Tensor:
    """Return the specification (B, K, K) whose row k is e_y - e_k: the margin of the label against class k.

    Example:
        >>> against(torch.tensor([1]), 2).tolist()
        [[[-1.0, 1.0], [0.0, 0.0]]]
    """
    identity = torch.eye(classes, device=labels.device)
    return identity[labels][:, None, :] - identity[None]
