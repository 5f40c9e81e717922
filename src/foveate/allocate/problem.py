"""The allocation problem as numbers: the units that get a level, and the cost and loss of each unit at each level.

A unit is whatever has one level: a tile, a strip of 16 rows, a whole weight, or several tied weights such as q, k and
v. A weight whose codes were chosen by coordinate descent is cut into strips. Descent makes the errors of a row's groups
cancel at each level, and the cancellation is lost where neighbouring tiles are read at different levels. That costs
more than levels for single tiles gain (docs/decisions.md). The cost of a unit is its bytes of planes and scales, or the
seconds that they add to a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.allocate.constraints import Constraints
from foveate.errors import BudgetError, SiteError
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.precision.maps import PrecisionMap, Site, find_sites, input_level_for
from foveate.precision.profiles import FITTED, Profile
from foveate.precision.timings import Timings


@dataclass(frozen=True, eq=False)
class Choices:
    """A choice of one of L levels for each of U units. This is all that the solver needs.

    Attributes:
        levels: the levels allowed, ascending.
        loss_UL, cost_UL: float64; cost in bytes or in seconds, never falling along L.
    """

    levels: tuple[int, ...]
    loss_UL: Tensor
    cost_UL: Tensor

    @property
    def predicted_UL(self) -> Tensor:
        """The predicted losses, which in a subclass may differ from the losses that choices are compared by."""
        return self.loss_UL


@dataclass(frozen=True, eq=False)
class Problem(Choices):
    """The choice of the levels of a precision map.

    Attributes:
        unit_of: for each weight site, int64 [tiles]: the unit of each tile.
        profile: the source of the numbers.
        input_levels: the level of each input; if None, `input_level_for` derives it from the weight's level.
    """

    unit_of: dict[str, Tensor]
    profile: Profile
    input_levels: Mapping[str, int] | None

    @property
    def predicted_UL(self) -> Tensor:
        """The losses as `Profile.predict` counts them: each level is scaled by its ratio of measured to summed loss."""
        known = dict(zip(WEIGHT_LEVELS, self.profile.measured_over_summed, strict=True))
        return self.loss_UL * torch.tensor([known[level] for level in self.levels], dtype=torch.float64)

    def to_map(self, choice_U: Tensor) -> PrecisionMap:
        """The map of a choice: an index into `levels` for each unit."""
        level_U = torch.tensor(self.levels, dtype=torch.uint8)[choice_U]
        levels: dict[str, int | bytes] = {}
        mean: dict[str, float] = {}
        for site in self.profile.weight_sites():
            tiles = level_U[self.unit_of[site.name]]
            levels[site.name] = bytes(tiles.tolist())
            mean.update(dict.fromkeys((site.name, *site.aliases), float(tiles.double().mean())))
        for site in self.profile.sites:
            if site.kind == "input":
                weight = f"{site.name.removesuffix(':input')}:weight"
                given = self.input_levels
                levels[site.name] = input_level_for(mean[weight]) if given is None else given[site.name]
        loss = float(self.predicted_UL.gather(1, choice_U[:, None]).sum()) + self.profile.predict_inputs(levels)
        return PrecisionMap(self.profile.sites, levels, self.profile.other_bytes, loss, self.profile.other_parameters)


def _tile_costs(site: Site, levels: tuple[int, ...], timings: Timings | None) -> Tensor:
    """What a tile of a site costs at each level, float64 [L]: bytes, or with timings seconds."""
    if timings is not None:
        return torch.tensor(timings.site_seconds(site, levels), dtype=torch.float64) / max(site.tiles, 1)
    return torch.tensor([site.tile_costs()[WEIGHT_LEVELS.index(level)] for level in levels], dtype=torch.float64)


def build(
    profile: Profile,
    constraints: Constraints,
    input_levels: Mapping[str, int] | None,
    timings: Timings | None = None,
) -> Problem:
    """Lay out the problem.

    Args:
        profile: what `foveate.quantize` measured.
        constraints: as for `foveate.allocate`.
        input_levels: the level of each input; if None, it follows from the weight's level.
        timings: the costs are seconds of these timings; bytes if not given.
    """
    levels = tuple(constraints.levels)
    columns = torch.tensor([WEIGHT_LEVELS.index(level) for level in levels])
    owner: dict[str, str] = {}
    for number, patterns in enumerate(constraints.tie):
        for site in (s for pattern in patterns for s in find_sites(profile.weight_sites(), pattern)):
            if owner.setdefault(site.name, f"tie {number}") != f"tie {number}":
                raise SiteError(f"{site.name} is in two tied groups")
    keys: dict[str, int] = {}
    unit_of: dict[str, Tensor] = {}
    losses, costs = [], []
    count = 0
    for site in profile.weight_sites():
        table = profile.losses[site.name].double()[:, columns]
        # a level may not count as worse than a lower one, since the lower planes can be left unread
        losses.append(table.cummin(1).values)
        costs.append(_tile_costs(site, levels, timings).expand(site.tiles, -1))
        if constraints.per_tile and site.name not in owner:
            together = site.grid[1] if FITTED in profile.statistics.get(site.name, {}) else 1
            unit_of[site.name] = count + torch.arange(site.tiles) // together
            count += site.tiles // together
        else:
            key = owner.get(site.name, site.name)
            if key not in keys:
                keys[key] = count
                count += 1
            unit_of[site.name] = torch.full((site.tiles,), keys[key])
    if not count:
        raise BudgetError("the profile has no weights to choose levels for")
    units = torch.cat([unit_of[s.name] for s in profile.weight_sites()])

    def summed(parts: list[Tensor]) -> Tensor:
        return torch.zeros(count, len(levels), dtype=torch.float64).index_add_(0, units, torch.cat(parts))

    loss_UL = summed(losses)
    if not bool(torch.isfinite(loss_UL).all()):
        raise BudgetError("the profile holds losses that are not finite")
    return Problem(levels, loss_UL, summed(costs), unit_of, profile, input_levels)
