"""Site: a named place whose precision can be chosen, and what its tiles take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from foveate.errors import SiteError
from foveate.formats.levels import GAINED_LEVELS, WEIGHT_LEVELS
from foveate.formats.packing import TILE_ROWS, tile_grid
from foveate.planes import resident_bytes


@dataclass(frozen=True)
class Site:
    """A named place whose precision can be chosen.

    Attributes:
        name: dotted module path and what it is, as in `model.layers.3.mlp.up_proj:weight`.
        kind: `weight`, `input` or `cache`.
        rows, columns, group: the weight's shape and the inputs a group; an input has 0 rows and its width; a cache its
            heads, the width of a head, and the tokens a group.
        row_gains: whether gains are kept for each row.
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

    @property
    def tiles(self) -> int:
        """Tiles of the weight; 0 for an input; the heads of a cache."""
        if self.kind == "cache":
            return self.rows
        strips, groups = self.grid
        return strips * groups if self.kind == "weight" else 0

    @property
    def weights(self) -> int:
        """Numbers of the weight, padding not counted; 0 for an input."""
        return self.rows * self.columns if self.kind == "weight" else 0

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern names this site or one of its aliases."""
        return any(fnmatchcase(name, pattern) for name in (self.name, *self.aliases))

    def tile_costs(self) -> list[int]:
        """Bytes of planes and scales that one tile takes at each of WEIGHT_LEVELS."""
        return [resident_bytes(level, 1, self.group) for level in WEIGHT_LEVELS]

    def stored_overhead(self) -> int:
        """Bytes in the file besides planes and scales: gains and the level each tile is stored for."""
        gain_rows = self.grid[0] * TILE_ROWS if self.row_gains else 1
        return self.tiles + 2 * len(GAINED_LEVELS) * gain_rows

    def resident_overhead(self) -> int:
        """Bytes in memory besides planes and scales: gains, the tile index and both maps."""
        return self.stored_overhead() + 2 * self.tiles + 48 * self.grid[0]


def find_sites(sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites that a shell pattern names; raises `SiteError` if there are none."""
    listed = tuple(sites)
    hits = [s for s in listed if s.matches(pattern)]
    if not hits:
        raise SiteError(f"pattern {pattern!r} matches none of {len(listed)} sites, which are like {_examples(listed)}")
    return hits


def meant_sites(sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites whose level a shell pattern sets: the weights that it names, or where it names none, all that it names.

    So `*` and `layers.3.*` are weights, and inputs are named as inputs, `layers.3.*:input`.

    Raises:
        SiteError: it names no site.
    """
    hits = find_sites(sites, pattern)
    return [s for s in hits if s.kind == "weight"] or hits


def _examples(sites: Sequence[Site]) -> str:
    return ", ".join(s.name for s in sites[:3]) + (", ..." if len(sites) > 3 else "")
