"""The price of a byte at which the mean bits meet a target: found on calibration data, and held while the model runs.

All functions are pure. Mean bits are those of `PrecisionMap.bits`, where each weight counts between its bits in the two
maps by the share of rows that read the higher one.

Legend: W weights, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.errors import BudgetError
from foveate.precision.adaptation import bytes_between
from foveate.precision.maps import PrecisionMap

#: Prices beyond these factors of the frontier's own slope are not tried.
_LEAST, _GREATEST = 1e-6, 1e6
#: The greatest factor by which one correction changes the price.
_STEP = 1.25


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What the higher of two maps costs: the bits of the lower one, and what each weight adds to them.

    Attributes:
        low: the average bits of the lower map.
        more: for each weight how many bits the average has more when all rows read its higher map.
    """

    low: float
    more: Mapping[str, float]

    @classmethod
    def between(cls, low: PrecisionMap, high: PrecisionMap) -> Shares:
        """Of two maps."""
        weights = max(sum(s.weights for s in low.weight_sites()), 1)
        return cls(low=low.bits, more={name: 8.0 * n / weights for name, n in bytes_between(low, high).items()})

    def bits(self, shares: Mapping[str, float]) -> float:
        """The mean bits where these shares of rows read the higher map; a weight that is not named always does."""
        return self.low + sum(bits * shares.get(name, 1.0) for name, bits in self.more.items())


def solved(shares: Shares, errors: Mapping[str, Tensor], unit: Mapping[str, float], target: float) -> float:
    """The multiplier at which the mean bits are `target`, if decisions would not change the inputs of later layers.

    Args:
        shares: of the two maps.
        errors: for each weight that is estimated float32 [M], the estimates of rows.
        unit: for each of these weights its threshold at a multiplier of 1.
        target: mean bits.

    Raises:
        BudgetError: the target is not between what the two maps can reach.
    """
    ordered = {name: found.sort().values for name, found in errors.items() if found.numel()}

    def bits(multiplier: float) -> float:
        return shares.bits(
            {
                name: 1 - int(torch.searchsorted(found, unit[name] * multiplier, right=True)) / len(found)
                for name, found in ordered.items()
            }
        )

    least, most = bits(_GREATEST), bits(0.0)
    if not least - 1e-9 <= target <= most + 1e-9:
        raise BudgetError(f"bits (={target:g}) is not between {least:.3f} and {most:.3f}, which the two maps can reach")
    low, high = math.log(_LEAST), math.log(_GREATEST)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bits(math.exp(middle)) > target else (low, middle)
    return math.exp(0.5 * (low + high))


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A slow correction of the price, which holds the mean bits at their target while inputs change.

    Attributes:
        target: mean bits.
        span: bits between the two maps: an error of the mean of this size changes the price by a factor of e.
        every: how many rows are observed for each step.
        tolerance: the share of the target by which the mean may be off before anything changes.
        multiplier: the price now.
        rows, bits: how many rows were observed since the start, and the sum of their mean bits.

    Raises:
        BudgetError: a value is not positive.
    """

    target: float
    span: float
    every: int = 4096
    tolerance: float = 0.002
    multiplier: float = 1.0
    rows: int = 0
    bits: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target", "span", "every", "multiplier"):
            if not getattr(self, name) > 0:
                raise BudgetError(f"{name} (={getattr(self, name)!r}) is not positive")

    @property
    def mean(self) -> float:
        """The mean bits of all rows that were observed; the target before any."""
        return self.bits / self.rows if self.rows else self.target


def corrected(state: Correction, rows: int, mean_bits: float) -> Correction:
    """The next state, after some rows with these mean bits.

    The price follows the mean of this step, so it settles where steps meet the target. A step with bits that are no
    number changes nothing.
    """
    if rows <= 0 or not math.isfinite(mean_bits):
        return state
    state = replace(state, rows=state.rows + rows, bits=state.bits + rows * mean_bits)
    off = mean_bits - state.target
    if abs(off) <= state.tolerance * state.target:
        return state
    # a short step is a noisy one, and counts less
    factor = math.exp(min(rows / state.every, 1.0) * off / state.span)
    return replace(state, multiplier=state.multiplier * min(max(factor, 1 / _STEP), _STEP))
