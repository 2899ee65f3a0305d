"""Printed digits that never claim more than the number they stand for. Imports nothing but the standard library."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from rsplugins.errors import ParameterError

_CONTEXT = Context(prec=400)  # 400 digits hold every float64


def round_down(value: float, digits: int = 6) -> str:
    """Print a number with so many decimals, rounded down: read back as a float, the text is never above ``value``.

    The digits come from the shortest decimal that names the float (its repr), not from its binary expansion: a text that was read
    back prints as itself again, and 0.3 stays 0.300 although its binary expansion starts with 0.29999. Plain formatting
    (``f"{value:.3f}"``) would round a radius up half of the time.

    Args:
        value: finite.
        digits: decimals to print, >= 0.

    Raises:
        ParameterError: when the value is not finite or digits is negative.

    Example:
        >>> round_down(0.7996443, 3), round_down(0.3, 3), round_down(1e-7, 6)
        ('0.799', '0.300', '0.000000')
    """
    return _rounded(value, digits, ROUND_FLOOR)


def round_up(value: float, digits: int = 6) -> str:
    """Print a number with so many decimals, rounded up, for the upper end of an interval; otherwise as :func:`round_down`.

    Example:
        >>> round_up(0.7996443, 3), round_up(0.3, 3)
        ('0.800', '0.300')
    """
    return _rounded(value, digits, ROUND_CEILING)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value) or digits < 0:
        raise ParameterError(f"Cannot print {value!r} with {digits!r} decimals.", fix="Pass a finite number and digits >= 0.")
    # float() sheds numpy scalars, whose repr is not a number.
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=rounding, context=_CONTEXT)
    return f"{abs(rounded) if rounded.is_zero() else rounded:f}"


def exactly(value: float, digits: int = 6) -> str:
    """Print the shortest decimal that reads back as ``value`` itself, without an exponent and with at least so many decimals.

    For files that other programs read: what they count at a radius is what was claimed at it, also at 8/255.

    Example:
        >>> exactly(0.3), exactly(8 / 255), exactly(1e-7), exactly(float("inf"))
        ('0.300000', '0.03137254901960784', '0.0000001', 'inf')
    """
    if not math.isfinite(value):
        return str(float(value))
    shortest = Decimal(repr(float(value)))
    places = -int(shortest.as_tuple().exponent)
    return _rounded(value, max(digits, places), ROUND_FLOOR)
