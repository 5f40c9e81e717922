"""Site: a named place in a model whose precision can be chosen, and the bytes that its tiles take.

A weight has a level for each of its tiles, an input one level, a cache a level for each head. Levels of a site are one
int where all are the same, and bytes otherwise, one byte for each tile or head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from foveate.errors import LevelError, SiteError
from foveate.formats.levels import (
    CACHE_LEVELS,
    GAINED_LEVELS,
    TILE_LEVELS,
    TOP_LEVEL,
    check_cache_level,
    check_input_level,
    check_tile_level,
)
from foveate.formats.packing import TILE_ROWS, tile_grid
from foveate.planes import level_bytes

#: The levels of a site: one for all its tiles, or a byte for each.
Levels = int | bytes


@dataclass(frozen=True)
class Site:
    """A named place whose precision can be chosen.

    Attributes:
        name: dotted module path and what it is, as in `model.layers.3.mlp.up_proj:weight`.
        kind: `weight`, `input` or `cache`.
        rows, columns, group: the shape of a weight and the inputs in a group. Of an input: 0 and its width. Of a cache:
            its heads, the width of a head, and the tokens in a group.
        row_gains: whether each row of the weight has gains of its own.
        rows_read: rows of the weight that one token (or image, or sentence position) reads: 1 for an embedding.
        aliases: other names of the same weight (tied weights are one site).
    """

    name: str
    kind: str
    rows: int
    columns: int
    group: int = 128
    row_gains: bool = False
    rows_read: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """(NT, G): strips of 16 rows, groups of inputs."""
        return tile_grid(self.rows, self.columns, self.group)

    @cached_property
    def tiles(self) -> int:
        """Tiles of the weight; 0 for an input; the heads of a cache."""
        if self.kind == "cache":
            return self.rows
        strips, groups = self.grid
        return strips * groups if self.kind == "weight" else 0

    @property
    def weights(self) -> int:
        """How many numbers the weight has, without padding; 0 for an input."""
        return self.rows * self.columns if self.kind == "weight" else 0

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern matches the name of this site or one of its aliases."""
        return any(fnmatchcase(name, pattern) for name in (self.name, *self.aliases))

    def tile_costs(self) -> list[int]:
        """Bytes of planes and scales, or of exact values, that one tile takes when it is stored up to each of
        TILE_LEVELS.
        """
        return [level_bytes(level, 1, self.group) for level in TILE_LEVELS]

    def stored_overhead(self) -> int:
        """Bytes in the file besides planes and scales: gains and the stored level of each tile."""
        gain_rows = self.grid[0] * TILE_ROWS if self.row_gains else 1
        return self.tiles + 2 * len(GAINED_LEVELS) * gain_rows

    def resident_overhead(self) -> int:
        """Bytes in memory besides planes and scales: gains, stored levels, tile offsets, and active levels twice, as
        the newest generation has them and as modules show them.
        """
        return self.stored_overhead() + 2 * self.tiles + 48 * self.grid[0]

    def exact_overhead(self) -> int:
        """Bytes in memory that say where the exact tiles of each strip begin, if the weight has any."""
        return 8 * (self.grid[0] + 1)

    def bytes_of_planes(self) -> int:
        """Bytes that one tile takes with all its planes."""
        return level_bytes(TOP_LEVEL, 1, self.group)


def find_sites(sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites that a shell pattern matches; raises `SiteError` if there are none."""
    listed = tuple(sites)
    hits = [s for s in listed if s.matches(pattern)]
    if not hits:
        raise SiteError(f"pattern {pattern!r} matches none of {len(listed)} sites, which are like {_examples(listed)}")
    return hits


def meant_sites(sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites whose level a shell pattern sets: the weights that it matches, or if there are none, all its matches.

    So `*` and `layers.3.*` mean weights, and inputs are matched as `layers.3.*:input`.

    Raises:
        SiteError: the pattern matches no site.
    """
    hits = find_sites(sites, pattern)
    return [s for s in hits if s.kind == "weight"] or hits


def _examples(sites: Sequence[Site]) -> str:
    return ", ".join(s.name for s in sites[:3]) + (", ..." if len(sites) > 3 else "")


def tile_levels(levels: Levels, tiles: int) -> bytes:
    """The levels as bytes, one for each tile."""
    return bytes((levels,)) * tiles if isinstance(levels, int) else levels


def level_counts(site: Site, levels: Levels) -> list[int]:
    """How many tiles have each of TILE_LEVELS."""
    if isinstance(levels, int):
        return [site.tiles if level == levels else 0 for level in TILE_LEVELS]
    return [levels.count(level) for level in TILE_LEVELS]


def checked_levels(site: Site, levels: Levels) -> Levels:
    """The levels of a site, as one int where all are the same; raises `LevelError` if its kind has no such levels."""
    if site.kind == "input":
        if not isinstance(levels, int):
            raise LevelError(f"{site.name}: an input has one level, not one for each tile")
        return check_input_level(levels)
    allowed, check = (CACHE_LEVELS, check_cache_level) if site.kind == "cache" else (TILE_LEVELS, check_tile_level)
    if isinstance(levels, int):
        return check(levels)
    if len(levels) != site.tiles:
        raise LevelError(f"{site.name}: {len(levels)} tile levels for {site.tiles} tiles")
    if sum(levels.count(level) for level in allowed) != len(levels):
        check(next(level for level in levels if level not in allowed))
    first = levels[0] if levels else 0
    return first if levels.count(first) == len(levels) else bytes(levels)


def stays_float(parameters: Mapping[str, int], weights: int) -> str:
    """Which parameters of a model are not on planes, in a sentence; empty if they are less than 0.5 % of all.

    Args:
        parameters: how many parameters stay float, by the class of their module.
        weights: how many weights are on planes.
    """
    stay = sum(parameters.values())
    total = max(stay + weights, 1)
    if stay < 0.005 * total:
        return ""
    parts = [(name, n) for name, n in sorted(parameters.items(), key=lambda part: -part[1]) if n >= 0.005 * total]
    named = ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in parts[:5])
    return f"{100 * stay / total:.0f} % of the parameters stay float" + (f": {named}" if named else "")
