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
from foveate.formats.levels import NESTED_LEVELS, PLANES, TOP_LEVEL, planes_of
from foveate.formats.packing import (
    SCALE_BYTES,
    TILE_ROWS,
    check_group,
    pack_plane,
    pack_scales,
    split_planes,
    tile_bytes,
    tile_grid,
    tile_offsets_of,
)
from foveate.memory.arena import arena


@dataclass(frozen=True, eq=False)
class PlaneTensor:
    """A weight [rows, columns] as bit planes.

    Attributes:
        planes: five uint8 1-D tensors: of each plane the tiles that store it, in tile order; empty where no tile does.
        scales: uint8 1-D, 16 scales and 16 offsets for each tile that stores any plane (`foveate.formats.grids`).
        gain: float16 [2, 1] or [2, NT * 16], near 1: factors of the scales at levels 2 and 3.
        stored_levels: uint8 [NT, G], the highest level at which each tile can be read.
        tile_offsets: int64 [NT, 6], where each strip's tiles begin (`foveate.formats.packing.tile_offsets_of`).
        active_levels: uint8 [n, NT, G], the level at which each tile is read, for each of 1 to 8 maps.
        rows, columns, group, reach: N, K, the inputs in a group, and the reach of the residual planes (0, 1 or 2).
        exponent: the scales are multiplied by 2 to this power.
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
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    geometry: tuple[int, int, int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # made once: every product needs them
        tensors = (*self.planes, self.scales, self.gain, self.tile_offsets, self.stored_levels, self.active_levels)
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

    def nbytes(self) -> int:
        """Bytes of all its tensors: planes, scales, gains, and the tile index with its active levels."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def dequantize(self, which: int = 0) -> Tensor:
        """The dense weight, float32 [rows, columns], at the active levels of map `which`."""
        dense: Tensor = torch.ops.foveate.plane_unpack(self.tensors, self.geometry, which)
        return dense

    def kept(self, level_tiles: Tensor) -> PlaneTensor:
        """A copy that stores each tile only up to `level_tiles` (uint8 [NT, G]); active levels above that are lowered.

        Raises:
            FoveateError: a level is above the stored one.
        """
        if bool((level_tiles > self.stored_levels).any()):
            raise FoveateError("a tile cannot be kept at a level above the one it is stored for")
        old, new = self.stored_levels.view(-1), level_tiles.reshape(-1)

        def gather(tiles: Tensor, least_level: int, width: int) -> Tensor:
            return tiles.view(-1, width)[(new >= least_level)[old >= least_level]].view(-1)

        planes = tuple(gather(p, NESTED_LEVELS[i], tile_bytes(i, self.group)) for i, p in enumerate(self.planes))
        stored_levels = level_tiles.clone()
        return replace(
            self,
            planes=planes,
            scales=gather(self.scales, 1, SCALE_BYTES),
            stored_levels=stored_levels,
            tile_offsets=tile_offsets_of(stored_levels),
            active_levels=torch.minimum(self.active_levels, stored_levels),
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
        reach: by how many bits the residual planes reach beyond one step of the anchor (0, 1 or 2).

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
    """The same weights, with one block of memory for each plane of all of them, one for all scales, and one for all
    active levels. So the memory of a plane can be given back as a whole.
    """
    parts: list[Callable[[PlaneTensor], Tensor]] = [
        *(lambda w, p=p: w.planes[p] for p in range(PLANES)),
        lambda w: w.scales,
    ]
    moved: list[list[Tensor]] = []
    for pick in parts:
        old = [pick(w) for w in tensors]
        new = arena([t.numel() * t.element_size() for t in old])
        for source, target in zip(old, new, strict=True):
            target.copy_(source.view(torch.uint8))
        moved.append([t.view(o.dtype) for t, o in zip(new, old, strict=True)])
    return share_active_levels(
        [replace(w, planes=tuple(m[i] for m in moved[:PLANES]), scales=moved[PLANES][i]) for i, w in enumerate(tensors)]
    )


def share_active_levels(tensors: Sequence[PlaneTensor]) -> list[PlaneTensor]:
    """The same weights with their active levels one after another in one block, so that a switch is one copy."""
    if not tensors:
        return []
    block = torch.cat([w.active_levels.reshape(-1) for w in tensors])
    parts = block.split([w.active_levels.numel() for w in tensors])
    return [replace(w, active_levels=part.view_as(w.active_levels)) for w, part in zip(tensors, parts, strict=True)]


def level_bytes(level: int, tiles: int, group: int) -> int:
    """Bytes of planes and scales that so many tiles take when they are stored up to `level`."""
    per_tile = sum(tile_bytes(p, group) for p in range(planes_of(level))) + (SCALE_BYTES if level else 0)
    return tiles * per_tile
