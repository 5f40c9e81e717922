"""The least divergence that float32 can tell from none, and how ratios of divergences are made and said.

A divergence is a sum of float32 terms of which the largest are about 1, so that rounding alone makes some 1e-7 of it.
Below that, one divergence over another is one rounding error over another.
"""

from __future__ import annotations

import math

import torch

#: Divergences up to it are rounding.
FLOOR: float = torch.finfo(torch.float32).eps
#: What is said of two of them.
BOTH_AT_FLOOR = "both at the floor of float32"


def both_at_floor(*divergences: float) -> bool:
    """Whether all are known and none can be told from 0."""
    return all(math.isfinite(value) and value <= FLOOR for value in divergences)


def ratio(measured: float, expected: float) -> float:
    """One divergence over another; NaN where both are at the floor, or there is nothing to divide by. A negative one is
    rounding and counts as 0.

    >>> ratio(0.02, 0.01)
    2.0
    >>> ratio(3e-9, 1e-9)
    nan
    """
    return max(measured, 0.0) / expected if expected > 0 and not both_at_floor(measured, expected) else math.nan


def ratio_text(measured: float, expected: float) -> str:
    """The ratio for people: `1.25`, `both at the floor of float32`, or a dash where it is not known."""
    if both_at_floor(measured, expected):
        return BOTH_AT_FLOOR
    found = ratio(measured, expected)
    return f"{found:.2f}" if math.isfinite(found) else "\u2013"


def no_worse(measured: float, other: float) -> bool:
    """Whether a divergence is no greater than another; two at the floor are equal."""
    return measured <= other or both_at_floor(measured, other)
