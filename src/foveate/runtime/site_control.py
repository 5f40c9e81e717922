"""Control of single operations: which sites the manager may lower, how far, and from which index on.

Everything is done to the frontier before the manager starts, as a map is changed by `with_level`: at run time the
manager moves one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from foveate.errors import LevelError, SiteError
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import Levels, PrecisionMap, Site, meant_sites, tile_levels


@dataclass(frozen=True, kw_only=True)
class SiteControl:
    """Settings for patterns of sites. A pattern means weights, or inputs if it matches no weight (`with_level`).

        SiteControl(hold={"*.k_proj": 8}, floor={"lm_head": 4}, from_index={"*.mlp.*": 3})

    Attributes:
        hold: sites that keep this level, or less where less is in force at index 0.
        floor: the lowest level that sites fall to.
        from_index: the first index at which sites may have less than they have at index 0, counted before maps that
            become alike through these settings are merged.
    """

    hold: Mapping[str, int] = field(default_factory=dict)
    floor: Mapping[str, int] = field(default_factory=dict)
    from_index: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("hold", "floor", "from_index"):
            for pattern, value in getattr(self, name).items():
                if type(value) is not int or value < 0:
                    what = "an index" if name == "from_index" else "a level"
                    raise LevelError(f"{name} of {pattern!r} (={value!r}) is not {what}, a whole number of at least 0")
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


def below(current: PrecisionMap, chain: Frontier) -> Frontier:
    """The chain that begins with a map and goes on with whatever of another chain is cheaper than it.

    Each further map has, at every tile, the lesser of the two levels. So the chain is nested, and reads nothing that
    the first map does not.

    Raises:
        SiteError: the chain is of another model.
    """
    if chain.maps and chain.maps[0].sites != current.sites:
        raise SiteError("the frontier is of another model than the map in force: their sites differ")
    maps = [current]
    for plan in chain:
        levels = {s.name: _combined(s, plan.levels[s.name], current.levels[s.name], min) for s in current.sites}
        lower = replace(current, levels=levels, predicted_loss=plan.predicted_loss)
        if lower.levels != maps[-1].levels:
            maps.append(lower)
    return Frontier(tuple(maps))


def controlled(chain: Frontier, control: SiteControl) -> Frontier:
    """The chain with the settings of single sites; maps that become alike are one.

    Raises:
        SiteError: a pattern matches no site.
        LevelError: sites of that kind cannot have the level.
    """
    maps: list[PrecisionMap] = []
    best = chain[0]
    for index, plan in enumerate(chain):
        levels: dict[str, Levels] = dict(plan.levels)
        for pattern, level in control.floor.items():
            for site in _named(best, pattern, level):
                levels[site.name] = _combined(site, levels[site.name], level, max)
        for pattern, first in control.from_index.items():
            for site in _named(best, pattern):
                if index < first:
                    levels[site.name] = best.levels[site.name]
        for pattern, level in control.hold.items():
            levels.update({site.name: level for site in _named(best, pattern, level)})
        # nothing is above index 0: a floor is no wish for more than the model has
        levels = {s.name: _combined(s, levels[s.name], best.levels[s.name], min) for s in best.sites}
        same = levels == dict(plan.levels)
        changed = plan if same else replace(plan, levels=levels, predicted_loss=float("nan"))
        if not maps or changed.levels != maps[-1].levels:
            maps.append(changed)
    return Frontier(tuple(maps))


def _named(plan: PrecisionMap, pattern: str, level: int | None = None) -> list[Site]:
    """The sites that a pattern means; checks that they can have the level."""
    text = pattern if ":" in pattern or pattern.endswith("*") else f"{pattern}:weight"
    named = meant_sites(plan.sites, text)
    if level is not None:
        plan.with_level(text, level)
    return named


def _combined(site: Site, one: Levels, other: Levels, choose: Callable[[int, int], int]) -> Levels:
    """The least or the greatest of two levels, tile by tile."""
    if isinstance(one, int) and isinstance(other, int):
        return choose(one, other)
    pairs = zip(tile_levels(one, site.tiles), tile_levels(other, site.tiles), strict=True)
    return bytes(choose(a, b) for a, b in pairs)
