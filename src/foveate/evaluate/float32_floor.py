"""The smallest divergence that float32 can distinguish from zero, and ratios of divergences that respect it.

A divergence is a sum of float32 terms, the largest of which are about 1. Rounding alone therefore contributes about
1e-7. Below this floor the ratio of two divergences is only a ratio of two rounding errors, and it is not reported.
"""

from __future__ import annotations

import math

import torch

#: A divergence up to this value may be rounding alone: 2^-23, or 1.2e-7.
FLOAT32_FLOOR: float = torch.finfo(torch.float32).eps
#: What messages say in place of a ratio of two such divergences.
BOTH_AT_FLOOR = "both at the floor of float32"


def both_at_floor(*divergences: float) -> bool:
    """Whether all divergences are finite and none can be distinguished from 0."""
    return all(math.isfinite(value) and value <= FLOAT32_FLOOR for value in divergences)


def ratio(measured: float, expected: float) -> float:
    """One divergence over another; NaN where both are at the floor, or the expected one is not positive.

    A negative measured divergence is rounding and counts as 0.

    >>> ratio(0.02, 0.01)
    2.0
    >>> ratio(3e-9, 1e-9)
    nan
    """
    return max(measured, 0.0) / expected if expected > 0 and not both_at_floor(measured, expected) else math.nan


def ratio_text(measured: float, expected: float) -> str:
    """The ratio as text: `1.25`, `both at the floor of float32`, or a dash where the ratio is not known."""
    if both_at_floor(measured, expected):
        return BOTH_AT_FLOOR
    found = ratio(measured, expected)
    return f"{found:.2f}" if math.isfinite(found) else "\u2013"


def no_worse(measured: float, other: float) -> bool:
    """Whether a divergence is no greater than another; two divergences at the floor are equal."""
    return measured <= other or both_at_floor(measured, other)
