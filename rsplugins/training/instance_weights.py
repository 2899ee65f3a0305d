"""Instance weights: GAIRAT's from the geometry of the attack, MAIL's from the probability margin. Pure functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Scheme = Literal["tanh", "sigmoid", "discrete", "tanh-rst"]


def geometry_weights(kappa: Tensor, steps: int, lambda_: float, scheme: Scheme = "tanh", *, normalise: bool = True) -> Tensor:
    r"""Return the weight of each input from its number of attack steps (Zhang et al., ICLR 2021).

    With :math:`z = \lambda + 5 (1 - 2\kappa/K)`: ``tanh`` is :math:`(1 + \tanh z)/2`, ``sigmoid`` is :math:`1/(1+e^{-z})`;
    ``discrete`` is :math:`(K + 1 - \kappa)/(K + 1)`; ``tanh-rst``, of the released semi-supervised code, is
    :math:`(1 + \tanh(\lambda + K/2 - \kappa))/2`. The released code truncates K/2 to a whole number, which fails at K = 1; this
    one does not. Normalisation is done on logarithms, so that weights that all underflow still have mean 1.

    Args:
        kappa: (B,) in 0..K.
        steps: K, at least 1.
        lambda_: any number but -inf and NaN; +inf gives exactly 1 for ``tanh`` and ``sigmoid``.
        scheme: which formula.
        normalise: divide by the mean over the batch, so that it becomes 1.

    Returns:
        (B,) float32, detached, not increasing in kappa.

    Example:
        >>> kappa = torch.tensor([0, 4, 5, 6, 10])
        >>> [round(w, 4) for w in geometry_weights(kappa, 10, 0.0, normalise=False).tolist()]
        [1.0, 0.8808, 0.5, 0.1192, 0.0]
    """
    kappa = kappa.detach().float()
    if scheme == "discrete":
        logarithm = torch.log((steps + 1 - kappa) / (steps + 1))
    elif scheme == "sigmoid":
        logarithm = F.logsigmoid(lambda_ + 5.0 * (1.0 - 2.0 * kappa / steps))
    elif scheme == "tanh":
        logarithm = F.logsigmoid(2.0 * (lambda_ + 5.0 * (1.0 - 2.0 * kappa / steps)))
    else:
        logarithm = F.logsigmoid(2.0 * (lambda_ + steps / 2 - kappa))
    if not normalise:
        return logarithm.exp()
    weights = (logarithm - logarithm.max()).exp()
    return weights * (len(weights) / weights.sum())


def margin_weights(logits: Tensor, labels: Tensor, *, slope: float, bias: float, normalise: bool = False) -> Tensor:
    r"""Return MAIL's weights :math:`3\,\mathrm{sigmoid}(s\,(\max_{k \ne y} p_k - p_y + b))` (Wang et al., NeurIPS 2021).

    Args:
        logits: (B, K) of the adversarial images.
        labels: (B,).
        slope: s.
        bias: b.
        normalise: divide by the mean over the batch; the released code does not.

    Returns:
        (B,) float32, detached.

    Example:
        >>> margin_weights(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), slope=10.0, bias=0.0)
        tensor([1.5000])
    """
    probabilities = logits.detach().float().softmax(1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    best_other = probabilities.scatter(1, labels[:, None], -1.0).amax(1)
    weights = 3.0 * torch.sigmoid(slope * (best_other - own + bias))
    return weights * (len(weights) / weights.sum()) if normalise else weights
