"""PlaneTensor: one weight as bit planes, with its tile index. Reading k bits of it is reading a prefix of its planes.

Two levels are told apart for each tile. Its *stored* level says which of its planes this tensor holds. Its *active*
level, at most the stored one, says how many of them are read.

The value is frozen: `from_codes` makes it, `kept` gives a copy that stores fewer planes, and `gathered` gives copies
whose planes lie in shared blocks of memory. The only bytes that change in place are those of `active_levels`; in a
quantized model they show what `foveate.nn.generations` published last. docs/format.md has the layout.

Shapes: N rows, K inputs; NT strips of 16 rows, G groups of inputs, so NT x G tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.grids import encoded, exponent_for
from foveate.formats.levels import EXACT_LEVELS, NESTED_LEVELS, PLANES, TOP_LEVEL, planes_of
from foveate.formats.packing import (
    EXACT_INDEX_BYTES,
    SCALE_BYTES,
    TILE_ROWS,
    check_group,
    matrix_to_tiles,
    pack_plane,
    pack_scales,
    split_planes,
    tile_bytes,
    tile_grid,
    tile_offsets_of,
)
from foveate.memory.arena import arena


@dataclass(frozen=True, eq=False)
class ExactTiles:
    """The tiles of a weight that are stored as floating point, in tile order.

    Attributes:
        values: float16, bfloat16 or float32 [E, g, 16], the values of each tile, its columns first.
        tiles: int32 [E], the number of each tile, ascending.
        grid: (NT, G) of the weight.
        offsets: int64 [NT + 1], where the tiles of each strip begin.
    """

    values: Tensor
    tiles: Tensor
    grid: tuple[int, int]
    offsets: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        strips, groups = self.grid
        counts = torch.bincount(self.tiles // max(groups, 1), minlength=strips)
        object.__setattr__(self, "offsets", F.pad(counts.cumsum(0), (1, 0)))

    @property
    def level(self) -> int:
        """16 or 32, the bits of a value."""
        return 8 * self.values.element_size()

    def levels(self) -> Tensor:
        """`level` at the tiles that are exact, and 0 at the others: uint8 [NT, G]."""
        found = torch.zeros(self.grid, dtype=torch.uint8)
        found.view(-1)[self.tiles.long()] = self.level
        return found

    def nbytes(self) -> int:
        """Bytes of its values, and of the index as the ops take it."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.tiles, self.offsets))

    def chosen(self, kept: Tensor) -> ExactTiles | None:
        """The tiles of a mask (bool [NT, G]); None if there are none."""
        mine = kept.reshape(-1)[self.tiles.long()]
        if not bool(mine.any()):
            return None
        return self if bool(mine.all()) else ExactTiles(self.values[mine], self.tiles[mine], self.grid)


#: The types of exact values.
EXACT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def are_tiles(numbers: Tensor, count: int) -> bool:
    """Whether numbers are some of 0 to `count` - 1, in ascending order."""
    if not numbers.numel():
        return True
    rising = bool((numbers[1:] > numbers[:-1]).all())
    return rising and int(numbers[0]) >= 0 and int(numbers[-1]) < count


def exact_tiles(w_NK: Tensor, tiles: Tensor, group: int, dtype: torch.dtype) -> ExactTiles | None:
    """Take tiles of a dense weight as they are; None if `tiles` is empty.

    Args:
        w_NK: floating point [N, K].
        tiles: int32 or int64 [E], their numbers, ascending.
        group: inputs in a group.
        dtype: of the values, float16, bfloat16 or float32; values are rounded to the nearest.
    """
    if not tiles.numel():
        return None
    grid = tile_grid(w_NK.shape[0], w_NK.shape[1], group)
    values = matrix_to_tiles(w_NK, group).reshape(-1, TILE_ROWS, group)[tiles.long()]
    return ExactTiles(values.transpose(1, 2).to(dtype).contiguous(), tiles.int(), grid)


#: What a weight without exact tiles gives the ops in their place.
_NO_EXACT_TILES = (torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class PlaneTensor:
    """A weight [rows, columns] as bit planes.

    Attributes:
        planes: five uint8 1-D tensors: of each plane the tiles that store it, in tile order; empty where no tile does.
        scales: uint8 1-D, 16 scales and 16 offsets for each tile that stores any plane (`foveate.formats.grids`).
        gain: float16 [2, 1] or [2, NT * 16], near 1: factors of the scales at levels 2 and 3.
        stored_levels: uint8 [NT, G], the highest level at which the planes of each tile can be read.
        tile_offsets: int64 [NT, 6], where each strip's tiles begin (`foveate.formats.packing.tile_offsets_of`).
        active_levels: uint8 [n, NT, G], the level at which each tile is read, for each of 1 to 8 maps.
        rows, columns, group, reach: N, K, the inputs in a group, and the reach of the residual planes (0 to 3).
        exponent: the scales are multiplied by 2 to this power.
        exact: the tiles that are stored as floating point too, or only so; None if there are none. They are read where
            the active level is theirs, 16 or 32.
        tensors: all the tensors above, in the order in which the ops take them (`foveate.kernels.planes.reference`).
        geometry: (rows, columns, group, reach, exponent), as the ops take them.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor
    gain: Tensor
    stored_levels: Tensor
    tile_offsets: Tensor
    active_levels: Tensor
    rows: int
    columns: int
    group: int
    reach: int
    exponent: int
    exact: ExactTiles | None = None
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    geometry: tuple[int, int, int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # made once: every product needs them
        e = self.exact
        exact = _NO_EXACT_TILES if e is None else (e.values.view(-1), e.tiles, e.offsets)
        stored = (*self.planes, self.scales, self.gain, self.tile_offsets, self.stored_levels)
        tensors = (*stored, *exact, self.active_levels)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "geometry", (self.rows, self.columns, self.group, self.reach, self.exponent))

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]."""
        return torch.Size((self.rows, self.columns))

    @property
    def grid(self) -> tuple[int, int]:
        """(NT, G): strips of 16 rows, groups of inputs."""
        return tile_grid(self.rows, self.columns, self.group)

    @property
    def highest_levels(self) -> Tensor:
        """The highest level at which each tile can be read, uint8 [NT, G]: of its exact values, or of its planes."""
        return highest(self.stored_levels, self.exact)

    def nbytes(self) -> int:
        """Bytes of all its tensors: planes, scales, gains, exact tiles, and the tile index with its active levels."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def dequantize(self, which: int = 0) -> Tensor:
        """The dense weight, float32 [rows, columns], at the active levels of map `which`."""
        dense: Tensor = torch.ops.foveate.plane_unpack(self.tensors, self.geometry, which)
        return dense

    def kept(self, level_tiles: Tensor) -> PlaneTensor:
        """A copy that stores each tile only up to `level_tiles` (uint8 [NT, G]); active levels above that are lowered.
        Exact values stay where the level is theirs, and planes go there.

        Raises:
            FoveateError: a level is above the stored one.
        """
        exact_levels = torch.zeros_like(self.stored_levels) if self.exact is None else self.exact.levels()
        level_tiles = rounded_up(level_tiles, self.stored_levels, exact_levels)
        as_exact = level_tiles > TOP_LEVEL
        if shortfall(level_tiles, self.stored_levels, exact_levels) is not None:
            raise FoveateError("a tile cannot be kept at a level above the one it is stored for")
        stored_levels = torch.where(as_exact, 0, level_tiles)
        old, new = self.stored_levels.view(-1), stored_levels.reshape(-1)

        def gather(tiles: Tensor, least_level: int, width: int) -> Tensor:
            return tiles.view(-1, width)[(new >= least_level)[old >= least_level]].view(-1)

        planes = tuple(gather(p, NESTED_LEVELS[i], tile_bytes(i, self.group)) for i, p in enumerate(self.planes))
        return replace(
            self,
            planes=planes,
            scales=gather(self.scales, 1, SCALE_BYTES),
            stored_levels=stored_levels,
            tile_offsets=tile_offsets_of(stored_levels),
            active_levels=rounded_up(
                torch.minimum(self.active_levels, level_tiles), stored_levels, torch.where(as_exact, level_tiles, 0)
            ),
            exact=None if self.exact is None else self.exact.chosen(as_exact),
        )


def from_codes(
    anchor_NK: Tensor, residual_NK: Tensor, scale_NG: Tensor, offset_NG: Tensor, gain: Tensor, *, group: int, reach: int
) -> PlaneTensor:
    """Pack rounded codes into planes. Every tile stores all planes, and all are active.

    Args:
        anchor_NK: uint8 [N, K], the 4-bit codes.
        residual_NK: uint8 [N, K], the 4-bit codes of the residual, the weight less its anchor.
        scale_NG, offset_NG: floating point [N, G]; each is stored as the nearest value that a byte can hold.
        gain: float16 [2, 1] or [2, N], for levels 2 and 3.
        group: inputs in a group: 32, 64 or 128.
        reach: how far the residual planes reach beyond one step of the anchor, 0 to 3
            (`foveate.formats.levels.ANCHOR_STEPS`).

    Raises:
        FoveateError: the group is not one of those.
    """
    check_group(group)
    rows, columns = anchor_NK.shape
    exponent = exponent_for(float(scale_NG.max()) if scale_NG.numel() else 0.0)
    stored_levels = torch.full(tile_grid(rows, columns, group), TOP_LEVEL, dtype=torch.uint8)
    return PlaneTensor(
        planes=tuple(pack_plane(q, i, group).flatten() for i, q in enumerate(split_planes(anchor_NK, residual_NK))),
        scales=pack_scales(*encoded(scale_NG, offset_NG, exponent)).flatten(),
        gain=F.pad(gain, (0, -rows % TILE_ROWS)) if gain.shape[1] > 1 else gain,
        stored_levels=stored_levels,
        tile_offsets=tile_offsets_of(stored_levels),
        active_levels=stored_levels[None].clone(),
        rows=rows,
        columns=columns,
        group=group,
        reach=reach,
        exponent=exponent,
    )


def linear(
    x: Tensor,
    weights: Sequence[PlaneTensor],
    biases: Sequence[Tensor],
    input_level: Tensor,
    maps: Tensor | None = None,
    order: Tensor | None = None,
    input_range: Tensor | None = None,
) -> list[Tensor]:
    """x [..., K] times each of the weights that share this input: [..., N] for each. See the op `plane_linear`.

    Raises:
        FoveateError: x does not have K columns.
    """
    tensors = [t for w in weights for t in w.tensors]
    geometries = [n for w in weights for n in w.geometry]
    return multiplied(x, tensors, geometries, biases, input_level, maps, order, input_range)


def multiplied(
    x: Tensor,
    tensors: Sequence[Tensor],
    geometries: Sequence[int],
    biases: Sequence[Tensor],
    input_level: Tensor,
    maps: Tensor | None = None,
    order: Tensor | None = None,
    input_range: Tensor | None = None,
) -> list[Tensor]:
    """`linear` on the tensors and geometries of weights, one after the other."""
    if x.shape[-1] != geometries[1]:
        raise FoveateError(f"x has {x.shape[-1]} columns, the weight {geometries[1]}")
    op = torch.ops.foveate.plane_linear_no_grad
    if torch.is_grad_enabled() and (x.requires_grad or any(b.requires_grad for b in biases)):
        op = torch.ops.foveate.plane_linear
    if x.dtype == torch.float64:
        return [y.double() for y in op(x.float(), tensors, biases, geometries, input_level, maps, order, input_range)]
    outputs: list[Tensor] = op(x, tensors, biases, geometries, input_level, maps, order, input_range)
    return outputs


def gathered(tensors: Sequence[PlaneTensor]) -> list[PlaneTensor]:
    """The same weights, with one block of memory for each plane of all of them, and one for each of the other tensors
    but exact tiles. So the memory of a plane can be given back as a whole, and a call sees at few places whether all of
    it is where it was.
    """
    parts: list[Callable[[PlaneTensor], Tensor]] = [
        *(lambda w, p=p: w.planes[p] for p in range(PLANES)),
        lambda w: w.scales,
        lambda w: w.gain,
        lambda w: w.tile_offsets,
        lambda w: w.stored_levels,
    ]
    moved: list[list[Tensor]] = []
    for pick in parts:
        old = [pick(w).contiguous() for w in tensors]
        new = arena([t.numel() * t.element_size() for t in old])
        for source, target in zip(old, new, strict=True):
            target.copy_(source.view(-1).view(torch.uint8))
        moved.append([t.view(o.dtype).view(o.shape) for t, o in zip(new, old, strict=True)])
    *planes, scales, gain, tile_offsets, stored_levels = (list(part) for part in moved)
    return share_active_levels(
        [
            replace(
                w,
                planes=tuple(plane[i] for plane in planes),
                scales=scales[i],
                gain=gain[i],
                tile_offsets=tile_offsets[i],
                stored_levels=stored_levels[i],
            )
            for i, w in enumerate(tensors)
        ]
    )


def share_active_levels(tensors: Sequence[PlaneTensor]) -> list[PlaneTensor]:
    """The same weights with their active levels one after another in one block, so that a switch is one copy."""
    if not tensors:
        return []
    block = torch.cat([w.active_levels.reshape(-1) for w in tensors])
    parts = block.split([w.active_levels.numel() for w in tensors])
    return [replace(w, active_levels=part.view_as(w.active_levels)) for w, part in zip(tensors, parts, strict=True)]


def highest(stored_levels: Tensor, exact: ExactTiles | None) -> Tensor:
    """The higher of the level of each tile's planes and that of its exact values, uint8 [NT, G]."""
    return stored_levels if exact is None else torch.maximum(stored_levels, exact.levels())


def rounded_up(levels: Tensor, stored_levels: Tensor, exact_levels: Tensor) -> Tensor:
    """Levels as they are read: a level above what planes give is that of the tile's exact values, where it has any.

    Args:
        levels: uint8 [..., T].
        stored_levels: uint8 [T], the highest level of each tile's planes.
        exact_levels: uint8 [T], the level of each tile's exact values; 0 where there are none.
    """
    return torch.where((levels > stored_levels) & (levels <= exact_levels), exact_levels, levels)


def shortfall(wanted: Tensor, stored: Tensor, exact: Tensor | None) -> tuple[int, int] | None:
    """(the highest level that tiles cannot be read at, the lowest that one of these is stored at); None if all can.

    Args:
        wanted: uint8 [NT, G].
        stored: the highest level of each tile's planes.
        exact: the level of each tile's exact values, 0 where there are none; None if no tile has any.
    """
    if exact is not None:
        wanted = rounded_up(wanted, stored, exact)
        stored = torch.where(wanted == exact, exact, stored)
    beyond = wanted > stored
    return (int(wanted[beyond].max()), int(stored[beyond].min())) if bool(beyond.any()) else None


def level_bytes(level: int, tiles: int, group: int) -> int:
    """Bytes of planes and scales, or of exact values and their index, that so many tiles take when they are stored up
    to `level`.
    """
    if level in EXACT_LEVELS:
        return tiles * (TILE_ROWS * group * level // 8 + EXACT_INDEX_BYTES)
    per_tile = sum(tile_bytes(p, group) for p in range(planes_of(level))) + (SCALE_BYTES if level else 0)
    return tiles * per_tile
