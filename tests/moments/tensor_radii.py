"""Radii of a logit Gaussian, as differentiable tensors: for training, and for looking at many at once. All are estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from rsplugins.moments.gaussian import density, deviation


def margins(mean: Tensor, covariance: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of logit[label] - logit[k] for every k, (B, K) each.

    Args:
        mean: (B, K).
        covariance: (B, K, K).
        label: (B,), the class of the largest mean when left out.

    Returns:
        Means and standard deviations; at k = label the mean is infinite and the deviation 1, so that it never matters.
    """
    label = mean.argmax(1) if label is None else label
    row = torch.arange(len(mean), device=mean.device)
    own = torch.nn.functional.one_hot(label, mean.shape[1]).bool()
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    variance = diagonal[row, label].unsqueeze(1) + diagonal - 2 * covariance[row, label]
    gap = (mean[row, label].unsqueeze(1) - mean).masked_fill(own, torch.inf)
    return gap, deviation(variance.masked_fill(own, 1.0))


def pairwise_radius(mean: Tensor, covariance: Tensor, sigma: float, label: Tensor | None = None) -> Tensor:
    r"""Return sigma times the smallest (mean / deviation) of the margins: the distance to the nearest of the pairwise boundaries.

    .. math:: R = \sigma \min_k \frac{\mu_A - \mu_k}{\sqrt{S_{AA} + S_{kk} - 2 S_{Ak}}}

    On a linear network this is the distance to the decision boundary for every sigma. On others it is optimistic, as it leaves
    out every class but one. Negative where ``label`` is not the class of the largest mean.

    Args:
        mean: (B, K).
        covariance: (B, K, K).
        sigma: of the propagated noise, raw pixels.
        label: (B,), the class of the largest mean when left out.

    Returns:
        (B,), raw pixels.

    Example:
        >>> round(pairwise_radius(torch.tensor([[3.0, 0.0]]), torch.eye(2).unsqueeze(0), 0.5).item(), 5)
        1.06066
    """
    gap, spread = margins(mean, covariance, label)
    return sigma * (gap / spread).amin(1)


def as_published_radius(mean: Tensor, covariance: Tensor, sigma: float) -> Tensor:
    r"""The paper's radius from the two largest means A and B (released code of Zhen et al., CVPR 2021).

    .. math:: R = \sigma \frac{\mu_A - \mu_B}{\sqrt{S_{AA} + S_{BB} + 2 |S_{AB}|}}
    """
    top = mean.topk(2, 1).indices
    row = torch.arange(len(mean), device=mean.device)
    a, b = top[:, 0], top[:, 1]
    variance = covariance[row, a, a] + covariance[row, b, b] + 2 * covariance[row, a, b].abs()
    radius: Tensor = sigma * (mean[row, a] - mean[row, b]) / deviation(variance)
    return radius


def union_radius(mean: Tensor, covariance: Tensor, sigma: float, label: Tensor | None = None) -> Tensor:
    r"""Return sigma Phi^-1 of the union bound of the class's probability under the logit Gaussian.

    .. math:: R = \sigma\, \Phi^{-1}\Big(1 - \sum_{k \ne A} \Phi\big({-(\mu_A - \mu_k)/s_k}\big)\Big)

    Computed and differentiated in logarithms, so it is finite, with finite gradients, where the probability rounds to 1.
    Where the bound is below .002, too little for a radius of any sign to mean something, it levels off at -3 sigma.

    Args:
        mean: (B, K).
        covariance: (B, K, K).
        sigma: raw pixels.
        label: (B,), the class of the largest mean when left out.

    Returns:
        (B,), raw pixels; negative where the bound is below 1/2.
    """
    gap, spread = margins(mean, covariance, label)
    failure = torch.logsumexp(torch.special.log_ndtr(-(gap / spread).clamp(max=1e6)), 1)
    low = torch.special.log_ndtr(torch.tensor(3.0).to(failure))
    failure = failure.clamp(max=low)
    with torch.no_grad():
        z = _quantile(failure)
        log_tail = torch.special.log_ndtr(-z)
        # density / tail, in logarithms because both underflow; below density's reach the ratio is z itself
        hazard = torch.where(z < 20, density(z) / log_tail.exp().clamp_min(1e-300), z + 1 / z.clamp_min(1.0))
    # One Newton step from the solution: the value stays, and the derivative is that of the implicit function.
    radius: Tensor = sigma * (z - (failure - log_tail) / hazard)
    return radius


def _quantile(log_tail: Tensor) -> Tensor:
    """Solve log Phi(-z) = log_tail by bisection, to the precision of the dtype."""
    high = (-2 * log_tail).clamp_min(0).sqrt() + 1
    low = torch.full_like(high, -4.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = torch.special.log_ndtr(-middle) > log_tail
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)
