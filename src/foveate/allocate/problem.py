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
from foveate.formats.levels import EXACT_LEVELS, TILE_LEVELS, WEIGHT_LEVELS
from foveate.precision.maps import PrecisionMap, Site, find_sites, input_level_for
from foveate.precision.profiles import FITTED, Profile
from foveate.precision.timings import Timings


@dataclass(frozen=True, eq=False)
class Choices:
    """A choice of one of L levels for each of U units. This is all that the solver needs.

    Attributes:
        levels: the levels allowed, ascending.
        loss_UL, cost_UL: float64; cost in bytes or in seconds, never falling along L. A unit without exact tiles has
            its highest nested level in place of an exact one.
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
        level_UL: uint8, the level that a choice gives a unit.
        unit_of: for each weight site, int64 [tiles]: the unit of each tile.
        profile: the source of the numbers.
        input_levels: the level of each input; if None, `input_level_for` derives it from the weight's level.
    """

    level_UL: Tensor
    unit_of: dict[str, Tensor]
    profile: Profile
    input_levels: Mapping[str, int] | None

    @property
    def predicted_UL(self) -> Tensor:
        """The losses as `Profile.predict` counts them: each level is scaled by its ratio of measured to summed loss."""
        factors = torch.ones(max(TILE_LEVELS) + 1, dtype=torch.float64)
        factors[list(WEIGHT_LEVELS)] = torch.tensor(self.profile.measured_over_summed, dtype=torch.float64)
        return self.loss_UL * factors[self.level_UL.long()]

    def to_map(self, choice_U: Tensor) -> PrecisionMap:
        """The map of a choice: an index into `levels` for each unit."""
        level_U = self.level_UL.gather(1, choice_U[:, None])[:, 0]
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
    return torch.tensor([site.tile_costs()[TILE_LEVELS.index(level)] for level in levels], dtype=torch.float64)


def _exact_tiles(profile: Profile, site: Site) -> Tensor:
    """The exact level of each tile of a weight, 0 for none: uint8 [T]."""
    found = profile.exact_levels(site.name)
    return torch.zeros(site.tiles, dtype=torch.uint8) if found is None else found


def _levels_of(profile: Profile, constraints: Constraints) -> tuple[int, ...]:
    """The levels allowed, without exact ones that no tile has."""
    kept = {int(level) for s in profile.weight_sites() for level in _exact_tiles(profile, s).unique().tolist()}
    levels = tuple(level for level in constraints.levels if level not in EXACT_LEVELS or level in kept)
    if not any(level in WEIGHT_LEVELS for level in levels):
        raise BudgetError(
            f"levels (={constraints.levels}) are exact, and only some tiles have exact values: add levels of planes"
        )
    return levels


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
    levels = _levels_of(profile, constraints)
    nested = tuple(level for level in levels if level in WEIGHT_LEVELS)
    columns = torch.tensor([WEIGHT_LEVELS.index(level) for level in nested])
    owner: dict[str, str] = {}
    for number, patterns in enumerate(constraints.tie):
        for site in (s for pattern in patterns for s in find_sites(profile.weight_sites(), pattern)):
            if owner.setdefault(site.name, f"tie {number}") != f"tie {number}":
                raise SiteError(f"{site.name} is in two tied groups")
    keys: dict[str, int] = {}
    unit_of: dict[str, Tensor] = {}
    losses, costs, exact_of = [], [], []
    count = 0
    for site in profile.weight_sites():
        table = profile.losses[site.name].double()[:, columns]
        # a level may not count as worse than a lower one, since the lower planes can be left unread
        losses.append(table.cummin(1).values)
        costs.append(_tile_costs(site, levels, timings).expand(site.tiles, -1))
        exact_of.append(_exact_tiles(profile, site))
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
        values = torch.cat(parts)
        return torch.zeros(count, values.shape[1], dtype=torch.float64).index_add_(0, units, values)

    loss_UL, cost_UL = summed(losses), summed(costs)
    if not bool(torch.isfinite(loss_UL).all()):
        raise BudgetError("the profile holds losses that are not finite")
    level_UL = torch.tensor(nested, dtype=torch.uint8).expand(count, -1)
    exact_U = torch.full((count,), 255, dtype=torch.uint8).scatter_reduce(0, units, torch.cat(exact_of), "amin")
    for column, level in enumerate(levels[len(nested) :], len(nested)):
        has = exact_U == level  # of all its tiles
        loss_UL = torch.cat([loss_UL, torch.where(has, 0.0, loss_UL[:, -1])[:, None]], 1)
        level_UL = torch.cat([level_UL, torch.where(has, level, level_UL[:, -1])[:, None]], 1)
        cost_UL[:, column] = torch.where(has, cost_UL[:, column], cost_UL[:, column - 1])
    return Problem(levels, loss_UL, cost_UL, level_UL, unit_of, profile, input_levels)
