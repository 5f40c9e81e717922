"""Timings: how long each product takes at each level on one machine, and so the time of a map.

    seconds of a map = the rest of a token + the sum over products of each tile's share at its level

A token of a language model, or one sample of another model, is timed with nothing beside it. The time of a product
depends on the shape of its weight, on the level, and on the rows of x, so it is measured once for each of these
(`foveate.measure_timings`). The rest of a token is what no map changes: attention, norms, and the calls around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from foveate.errors import BudgetError, SiteError
from foveate.formats.levels import EXACT_LEVELS, TILE_LEVELS, TOP_LEVEL, WEIGHT_LEVELS
from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Site, level_counts

#: No product takes so many seconds, and sums of such times are still numbers.
_LONGEST = 1e12


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long each product takes at each level on one machine.

        timings = fv.measure_timings(model, batch)
        timings.seconds_of(plan), timings.machine

    Attributes:
        machine: the machine and the number of threads.
        products: for each weight site, the seconds that its products take in one token or sample, at each of `levels`.
            A weight that is only looked up, as an embedding is, takes 0.
        rest: the seconds of a token or sample outside of products on planes.
        levels: the levels that were timed, in ascending order.

    Raises:
        BudgetError: a time is not finite or is negative, or a site has not one for each level.
    """

    machine: str
    products: Mapping[str, tuple[float, ...]] = field(hash=False)
    rest: float
    levels: tuple[int, ...] = WEIGHT_LEVELS

    def __post_init__(self) -> None:
        object.__setattr__(self, "products", {name: tuple(times) for name, times in self.products.items()})
        object.__setattr__(self, "levels", tuple(self.levels))
        if not isinstance(self.machine, str):
            raise BudgetError(f"machine (={self.machine!r}) of timings is not a text")
        if not self.levels or not all(type(level) is int and 0 <= level < 64 for level in self.levels):
            raise BudgetError(f"levels (={self.levels}) of timings are not levels of weights")
        if list(self.levels) != sorted(set(self.levels)):
            raise BudgetError(f"levels (={self.levels}) of timings do not ascend")
        for name, times in (*self.products.items(), ("the rest", (self.rest,) * len(self.levels))):
            if len(times) != len(self.levels):
                raise BudgetError(f"timings have {len(times)} times for {name}, not one for each of {self.levels}")
            if not all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= _LONGEST for t in times):
                raise BudgetError(f"timings of {name} (={times}) are not from 0 to {_LONGEST:g} seconds")

    def seconds_of(self, plan: PrecisionMap) -> float:
        """The seconds of a token or sample at a map.

        Raises:
            SiteError: a weight of the map was not timed.
            BudgetError: a level of the map was not timed.
        """
        return self.rest + sum(self.seconds_of_weight(plan, site) for site in plan.weight_sites())

    def site_seconds(self, site: Site, levels: tuple[int, ...]) -> list[float]:
        """The seconds of a site's products with all its tiles at each of some levels; errors as for `seconds_of`.

        No level counts as faster than a lower one: each has at least the time of those below it. Exact levels are not
        timed; they take longer than level 8 as they have more bytes.
        """
        times = self.products.get(site.name)
        if times is None:
            raise SiteError(f"{site.name} was not timed: measure the timings of this model again")
        timed = [level for level in levels if level not in EXACT_LEVELS]
        missing = next((level for level in timed if level not in self.levels), None)
        if missing is not None:
            raise BudgetError(f"level (={missing}) was not timed: the timings have {', '.join(map(str, self.levels))}")
        rising = dict(zip(self.levels, accumulate(times, max), strict=True))
        bytes_at = dict(zip(TILE_LEVELS, site.tile_costs(), strict=True))
        top = max(rising.values())
        for level in EXACT_LEVELS:
            rising.setdefault(level, top * bytes_at[level] / bytes_at[TOP_LEVEL])
        return [rising[level] for level in levels]

    def to_json(self) -> dict[str, Any]:
        """The timings as JSON."""
        return {
            "machine": self.machine,
            "levels": list(self.levels),
            "rest": self.rest,
            "products": {name: list(times) for name, times in self.products.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Timings:
        """The inverse of `to_json`; raises `BudgetError` for what is no timings."""
        try:
            products = {str(name): tuple(times) for name, times in data["products"].items()}
            return cls(machine=data["machine"], products=products, rest=data["rest"], levels=tuple(data["levels"]))
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise BudgetError(f"malformed timings: {error!r}") from error

    def seconds_of_weight(self, plan: PrecisionMap, site: Site) -> float:
        """The seconds of a weight's products in a token or sample at a map; errors as for `seconds_of`."""
        counts = level_counts(site, plan.levels[site.name])
        times = self.site_seconds(site, TILE_LEVELS)
        return sum(n * t for n, t in zip(counts, times, strict=True)) / max(site.tiles, 1)
