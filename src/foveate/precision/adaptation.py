"""Adaptation: each input chooses between two neighbouring maps of the frontier, weight by weight.

The choice is made inside the op (`foveate.kernels.planes.choice`): a row of inputs reads the higher map of a weight
where the estimated loss that the lower one adds is above a threshold. This module has what a writer decides once for
all rows: how far the two maps are from the index in force, which strips of each weight are read for the estimate, and
the threshold of each weight.

**The estimate** is `1/2 sum_n G_n (y_high - y_low)_n^2` over the outputs n of a weight, where G_n is the mean squared
gradient of the loss. It is made from a few strips of 16 outputs. Only strips whose levels differ between the maps add
to it, and they are drawn in proportion to the loss that the profile expects of them: systematic sampling (Madow,
Ann. Math. Statist. 1949), each divided by its probability of being drawn (Horvitz and Thompson, JASA 1952). Strips that
would be drawn more than once are always taken. A weight with few such strips is estimated exactly.

**The threshold** is one price for all weights: a multiplier times the frontier's own slope between the two maps
(predicted loss for what the maps cost), times what the higher map costs more of this weight, in bits, bytes or seconds
(`foveate.precision.costs`). So what is spent goes where it saves the most loss.

Shapes: N outputs of a weight, NT strips of 16 outputs, G groups, S sampled strips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import BudgetError
from foveate.formats.levels import TILE_LEVELS, WEIGHT_LEVELS
from foveate.precision.costs import Bits, Cost
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Site, tile_levels

TILE_ROWS = 16
#: The share of the probability that all strips have alike: no strip has a very small one, and so a very large weight.
_ALIKE = 0.1
#: Pairs of maps of which an estimator keeps what it found; importance that is followed makes ever new ones.
_MOST_KNOWN = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The strips of one weight that an estimate reads.

    Attributes:
        strips: int64 [S], in ascending order.
        row_weights: float32 [S, 16], what the squared difference of each output counts.
    """

    strips: Tensor
    row_weights: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Between:
    """Two maps, and what lies between them.

    Attributes:
        low, high: the maps.
        costs: for each weight what the higher one costs more.
        samples: of each weight, in the order of the sites.
    """

    low: PrecisionMap
    high: PrecisionMap
    costs: Mapping[str, float]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator:
    """What estimates of all weights are made from. Values are compared by identity.

    Attributes:
        gradients: for each weight that products read float32 [N], the mean squared gradient of the loss by each output.
            A weight without an entry is not estimated, and reads the higher map.
        losses: as `Profile.losses`: what strips are expected to cost, by which they are drawn.
        strips: how many strips of each weight are read.
        seed: of the draw.
        ratios: for a weight a factor of its estimates, such as the true errors over the estimated ones; 1 if not given.
        rows: how many rows of inputs a weight has for each sample that costs are counted for; 1 if not given.
        cost: the unit in which the two maps are counted.

    Raises:
        BudgetError: `strips` is not a positive number.
    """

    gradients: Mapping[str, Tensor]
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    strips: int = 4
    seed: int = 0
    ratios: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Bits)
    _known: dict[tuple[int, int], Between] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.strips) is not int or self.strips < 1:
            raise BudgetError(f"strips (={self.strips!r}) is not a whole number from 1 on")

    def __deepcopy__(self, memo: Any) -> Estimator:
        return self  # frozen, and states that hold the same one are equal

    def between(self, low: PrecisionMap, high: PrecisionMap) -> Between:
        """What is known of two maps; made once for each pair, since a price changes more often than maps."""
        known = self._known.get((id(low), id(high)))
        if known is None:
            samples = tuple(self._sample(i, site, low, high) for i, site in enumerate(low.weight_sites()))
            known = Between(low=low, high=high, costs=self.cost.between(low, high), samples=samples)
            if len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[id(low), id(high)] = known
        return known

    def _sample(self, number: int, site: Site, low: PrecisionMap, high: PrecisionMap) -> Sample:
        gradient_N = self.gradients.get(site.name)
        if gradient_N is None:
            return Sample(strips=torch.empty(0, dtype=torch.int64), row_weights=torch.empty(0, TILE_ROWS))
        strips, inclusion = drawn(self._expected(site, low, high), self.strips, f"{self.seed}:{number}")
        padded = F.pad(gradient_N.float(), (0, -site.rows % TILE_ROWS)).view(-1, TILE_ROWS)
        weights = 0.5 * self.ratios.get(site.name, 1.0) * padded[strips] / inclusion[:, None]
        return Sample(strips=strips, row_weights=weights.float().contiguous())

    def _expected(self, site: Site, low: PrecisionMap, high: PrecisionMap) -> Tensor:
        """What the lower map is expected to lose in each strip, float64 [NT]; 0 where the levels are the same."""
        levels = [_tiles(site, plan) for plan in (low, high)]
        differs = (levels[0] != levels[1]).any(1)
        table = self.losses.get(site.name)
        if table is None:
            return differs.double()
        # an exact tile loses nothing
        table = torch.nn.functional.pad(table.double(), (0, 1))
        columns = torch.full((TILE_LEVELS[-1] + 1,), len(WEIGHT_LEVELS))
        columns[torch.tensor(WEIGHT_LEVELS)] = torch.arange(len(WEIGHT_LEVELS))
        lost = [table.gather(1, columns[part.long()].view(-1, 1)).view(part.shape) for part in levels]
        strips = (lost[0] - lost[1]).sum(1).clamp_min(0) * differs
        if not bool(differs.any()) or float(strips.sum()) <= 0:
            return differs.double()
        alike = float(strips.sum()) / int(differs.sum())
        return (1 - _ALIKE) * strips + _ALIKE * alike * differs


def _tiles(site: Site, plan: PrecisionMap) -> Tensor:
    """The levels of a weight's tiles, uint8 [NT, G]."""
    flat = torch.frombuffer(bytearray(tile_levels(plan.levels[site.name], site.tiles)), dtype=torch.uint8)
    return flat.view(-(-site.rows // TILE_ROWS), -1)


def drawn(sizes: Tensor, count: int, seed: str) -> tuple[Tensor, Tensor]:
    """A systematic sample in which the probability of each element is in proportion to its size.

    Args:
        sizes: float64 [n], not negative; an element of size 0 is never drawn.
        count: how many to draw. All elements are, if no more than that have a size.
        seed: of the draw.

    Returns:
        The numbers of those that were drawn, int64, in ascending order, and the probability of each of being drawn.
    """
    inclusion = (sizes > 0).double()
    open_ = sizes > 0
    if int(open_.sum()) > count:
        left = count
        while True:  # those that would be drawn more than once are always taken
            wanted = torch.where(open_, sizes * left / sizes[open_].sum(), 0.0)
            always = open_ & (wanted >= 1)
            if not bool(always.any()):
                break
            open_ = open_ & ~always
            left -= int(always.sum())
        inclusion = torch.where(open_, wanted, inclusion)
    ends = inclusion.cumsum(0)
    # a hash that is the same in every process
    start = (sum((i + 1) * 7919 * ord(c) for i, c in enumerate(seed)) * 2654435761 % 2**32) / 2**32
    taken = torch.floor(ends - start + 1e-9) > torch.floor(torch.cat([ends.new_zeros(1), ends[:-1]]) - start + 1e-9)
    chosen = (taken | (inclusion >= 1)).nonzero()[:, 0]
    return chosen, inclusion[chosen]


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How inputs choose: each row and weight reads one of two maps around the index in force.

    Attributes:
        below: how many maps the lower one is beyond the index; it goes no further than the floors.
        above: how many maps the higher one is before the index.
        multiplier: the price, in units of the frontier's slope between the two maps (predicted loss for each unit of
            cost); in loss for each unit of cost where the frontier has no predicted losses.
        estimator: what the estimates are made from.
        factors: for a weight, how much more its lower map adds to the divergence at the output than estimates say, as
            it was measured there (`foveate.inputs.feedback`); 1 if not given. Its threshold is divided by it. At 0 all
            rows read the lower map, and at infinity all whose products differ read the higher one.

    Raises:
        BudgetError: an offset is not a whole number from 0 on, the multiplier is not a number from 0 on, or a factor is
            negative or no number.
    """

    below: int
    above: int
    multiplier: float
    estimator: Estimator
    factors: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("below", "above"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise BudgetError(f"{name} (={value!r}) is not a whole number from 0 on")
        if not isinstance(self.multiplier, (int, float)) or not self.multiplier >= 0 or math.isinf(self.multiplier):
            raise BudgetError(f"multiplier (={self.multiplier!r}) is not a finite number from 0 on")
        for name, factor in self.factors.items():
            if not factor >= 0:
                raise BudgetError(f"factor (={factor!r}) of {name} is not a number from 0 on")

    def around(self, index: int, furthest: int) -> tuple[int, int]:
        """The indices (low, high) of the two maps around an index, of which none is beyond `furthest`."""
        return min(index + self.below, furthest), max(index - self.above, 0)

    def choice(self, frontier: Frontier, low: int, high: int) -> Choice:
        """What decides between two maps of a frontier."""
        estimator, known = self.estimator, self.estimator.between(frontier[low], frontier[high])
        price = self.multiplier * slope(known)
        thresholds = tuple(
            self._threshold(name, price * cost / estimator.rows.get(name, 1.0)) if name in estimator.gradients else -1.0
            for name, cost in known.costs.items()
        )
        return Choice(thresholds=thresholds, samples=known.samples)

    def _threshold(self, name: str, price: float) -> float:
        factor = self.factors.get(name, 1.0)
        return price / factor if factor > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What decides between two maps.

    Attributes:
        thresholds: of each weight; the higher map is read where the estimated error is above. -1 is always below.
        samples: of each weight.
    """

    thresholds: tuple[float, ...]
    samples: tuple[Sample, ...] = field(compare=False)


def slope(between: Between) -> float:
    """The predicted loss that a unit of cost saves between two maps; 1 where that is not known, or not positive."""
    saved, more = between.low.predicted_loss - between.high.predicted_loss, sum(between.costs.values())
    return saved / more if math.isfinite(saved) and saved > 0 and more > 0 else 1.0
