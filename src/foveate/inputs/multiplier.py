"""The price at which the mean cost meets a target: found on calibration data, and held while the model runs.

All functions are pure. Costs are bits, bytes or seconds (`foveate.precision.costs`). Each weight counts between its
costs in the two maps by the share of rows that read the higher one.

Legend: W weights, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.errors import BudgetError
from foveate.precision.costs import Bits, Cost
from foveate.precision.maps import PrecisionMap

#: Prices beyond these factors of the frontier's own slope are not tried.
_LEAST, _GREATEST = 1e-6, 1e6
#: The greatest factor by which one correction changes the price.
_STEP = 1.25


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What the higher of two maps costs: the cost of the lower one, and what each weight adds to it.

    Attributes:
        low: the cost of the lower map.
        more: for each weight how much more it is when all rows read its higher map.
    """

    low: float
    more: Mapping[str, float]

    @classmethod
    def between(cls, low: PrecisionMap, high: PrecisionMap, cost: Cost | None = None) -> Shares:
        """Of two maps, in average bits if no other cost is given."""
        cost = cost or Bits()
        return cls(low=cost.of(low), more=cost.between(low, high))

    def mean(self, shares: Mapping[str, float]) -> float:
        """The mean cost where these shares of rows read the higher map; a weight that is not named always does."""
        return self.low + sum(more * shares.get(name, 1.0) for name, more in self.more.items())


def solved(shares: Shares, errors: Mapping[str, Tensor], unit: Mapping[str, float], target: float) -> float:
    """The multiplier at which the mean cost is `target`, if decisions would not change the inputs of later layers.

    Args:
        shares: of the two maps.
        errors: for each weight that is estimated float32 [M], the estimates of rows.
        unit: for each of these weights its threshold at a multiplier of 1.
        target: the mean cost.

    Raises:
        BudgetError: the target is not between what the two maps can reach.
    """
    ordered = {name: found.sort().values for name, found in errors.items() if found.numel()}

    def mean(multiplier: float) -> float:
        return shares.mean(
            {
                name: 1 - int(torch.searchsorted(found, unit[name] * multiplier, right=True)) / len(found)
                for name, found in ordered.items()
            }
        )

    least, most = mean(_GREATEST), mean(0.0)
    if not least * (1 - 1e-9) <= target <= most * (1 + 1e-9):
        raise BudgetError(
            f"target (={target:g}) is not between {least:.4g} and {most:.4g}, which the two maps can reach"
        )
    low, high = math.log(_LEAST), math.log(_GREATEST)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean(math.exp(middle)) > target else (low, middle)
    return math.exp(0.5 * (low + high))


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A slow correction of the price, which holds the mean cost at its target while inputs change.

    Attributes:
        target: the mean cost.
        span: the cost between the two maps: an error of the mean of this size changes the price by a factor of e.
        every: how many rows are observed for each step.
        tolerance: the share of the span by which the mean may be off before anything changes.
        multiplier: the price now.
        rows, spent: how many rows were observed since the start, and the sum of their costs.

    Raises:
        BudgetError: a value is not positive.
    """

    target: float
    span: float
    every: int = 4096
    tolerance: float = 0.016
    multiplier: float = 1.0
    rows: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target", "span", "every", "multiplier"):
            if not getattr(self, name) > 0:
                raise BudgetError(f"{name} (={getattr(self, name)!r}) is not positive")

    @property
    def mean(self) -> float:
        """The mean cost of all rows that were observed; the target before any."""
        return self.spent / self.rows if self.rows else self.target


def corrected(state: Correction, rows: int, mean: float) -> Correction:
    """The next state, after some rows with this mean cost.

    The price follows the mean of this step, so it settles where steps meet the target. A step whose mean is no number
    changes nothing.
    """
    if rows <= 0 or not math.isfinite(mean):
        return state
    state = replace(state, rows=state.rows + rows, spent=state.spent + rows * mean)
    off = mean - state.target
    if abs(off) <= state.tolerance * state.span:
        return state
    # a short step is a noisy one, and counts less
    factor = math.exp(min(rows / state.every, 1.0) * off / state.span)
    return replace(state, multiplier=state.multiplier * min(max(factor, 1 / _STEP), _STEP))
