r"""Gaussian noise on the grid of 8-bit images: boundaries of the cells, and what their rounding costs. No torch.

**Why no float is trusted.** In float32 the sum of an image and a noise value rounds differently for different images, and a
classifier can read the image off the rounding: it certifies radii that do not hold (Voracek and Hein, "Sound Randomized Smoothing
in Floating-Point Arithmetics", ICLR 2023). On the grid of 8-bit images nothing has to be rounded after the sum:

**Claim.** Let :math:`q(v) = \lfloor 255 v + 1/2 \rfloor` elementwise, h any function of integer vectors (here: divide by 255 in
float32, run the network, take the class), and :math:`f = h \circ q`, a measurable function on :math:`R^d`. Let
:math:`x = k / 255` for integers k and :math:`Z \sim N(0, \sigma^2 I)`. Then

.. math:: f(x + Z) = h(q(k/255 + Z)) = h(k + q(Z)),

because adding an integer commutes with rounding. So votes of :math:`h(k + M)` with M distributed as q(Z) are votes of f under
*continuous* Gaussian noise, and theorem 1 of Cohen et al. (ICML 2019) holds for f at x in exact arithmetic: the majority class of
f is constant on the ball. At every other 8-bit image :math:`x' = k'/255` of the ball, that majority class is again the one of
:math:`h(k' + M)`, which is what is deployed. The network itself may round as it likes: h only has to be a function.

**What is left.** M is drawn by comparing 64 uniform bits with the boundaries :math:`T_m = P(M < m)\, 2^{64}`, rounded to
integers. :func:`total_variation` bounds the distance between the distribution drawn and that of q(Z), for one element; over d
elements it is at most d times that, and a lower bound of a probability under the noise drawn, less this, is one under q(Z).
The bits themselves are those of torch's generator, taken for uniform and independent, as in every randomised method.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from rsplugins.errors import ParameterError
from rsplugins.statistics._checks import check_positive

LEVELS = 255
"""Steps of an 8-bit pixel: the grid is k/255."""

_RELATIVE = 2.0**-49
"""Allowance for the relative error of the normal cdf at a boundary, in float64; far above what comparing with 40 digits shows."""

_LARGEST_SIGMA = 10.0


@functools.lru_cache(maxsize=16)
def boundaries(sigma: float) -> tuple[int, NDArray[np.int64]]:
    r"""Return the first value that M can take, and the boundaries between its values in 64-bit uniform numbers.

    Args:
        sigma: standard deviation on [0, 1] pixels, > 0.

    Returns:
        ``(first, T)``: for U uniform on :math:`-2^{63} .. 2^{63}-1`, M is ``first`` plus the number of T that are <= U.

    Raises:
        ParameterError: sigma is not in (0, 10].

    Example:
        >>> first, edges = boundaries(0.25)
        >>> bool((np.diff(edges.astype(object)) >= 0).all()), first < -500
        (True, True)
    """
    sigma = check_positive(sigma, "sigma")
    if sigma > _LARGEST_SIGMA:
        raise ParameterError(f"sigma = {sigma:g} is too large for noise on the 8-bit grid; allowed: up to {_LARGEST_SIGMA:g}.")
    scale = sigma * LEVELS
    # P(M < m) = Phi((m - 1/2) / scale), for m <= 0, where the cdf keeps its relative precision; the rest by symmetry.
    m = np.arange(-math.ceil(10 * scale) - 1, 1)
    below = [int(math.ldexp(float(p), 64) + 0.5) for p in ndtr((m - 0.5) / scale)]
    start = next(position for position, count in enumerate(below) if count >= 1)
    lower = below[start:]
    both = lower + [2**64 - count for count in reversed(lower)]
    signed = np.array([count - 2**63 for count in both], dtype=np.int64)
    return int(m[start]) - 1, signed


@functools.lru_cache(maxsize=16)
def total_variation(sigma: float) -> float:
    """Return a bound of the total variation between the noise drawn and rounded Gaussian noise, for one element.

    The distance is at most the sum of the boundaries' errors: half a unit of 2^-64 each for the rounding to integers, a
    relative :data:`_RELATIVE` for the cdf, and the mass beyond the first and last boundary, which is left out.

    Example:
        >>> total_variation(0.25) < 1e-12
        True
    """
    _, edges = boundaries(sigma)
    scale = sigma * LEVELS
    m = np.arange(-math.ceil(10 * scale) - 1, 1)
    cdf = _RELATIVE * float(ndtr((m - 0.5) / scale).sum())
    left_out = 2.0**-64 * (len(m) + 2)
    return 2 * (cdf + left_out) + len(edges) * 2.0**-65
