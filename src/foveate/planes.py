"""PlaneTensor: one weight as bit planes, with its tile index. A k-bit view is a prefix of its planes.

The value is frozen: rounding makes it, `kept` drops planes from it, `moved` puts it elsewhere. The only bytes that ever
    change in place are those of `tags`, the level each tile is read at, and only
`foveate.apply` writes them. docs/format.md has the layout.
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
    tile_starts,
)
from foveate.memory.arena import arena


@dataclass(frozen=True, eq=False)
class PlaneTensor:
    """A weight [rows, columns] as bit planes.

    Attributes:
        planes: five uint8 1-D tensors, the stored tiles of each plane in tile order; empty where no tile has the plane.
        scales: uint8 1-D, 16 scales and 16 offsets for each stored tile (`formats.grids`).
        gain: float16 [2, 1] or [2, NT * 16], near 1: what levels 2 and 3 multiply the scales with.
        resident: uint8 [NT, G], the highest level each tile is stored for.
        starts: int64 [NT, 6], see `formats.packing.tile_starts`.
        tags: uint8 [2, NT, G], the level each tile is read at, for each of two maps.
        rows, columns, group, reach: the shape, the inputs a group, and the reach of the residual planes (0, 1, 2).
        exponent: the power of two that the scales are multiplied with.
        tensors, form: the same as the ops take it, see kernels/planes/reference.py.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor
    gain: Tensor
    resident: Tensor
    starts: Tensor
    tags: Tensor
    rows: int
    columns: int
    group: int
    reach: int
    exponent: int
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    form: tuple[int, int, int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # every product needs them, and a frozen value can keep them
        tensors = (*self.planes, self.scales, self.gain, self.starts, self.resident, self.tags)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "form", (self.rows, self.columns, self.group, self.reach, self.exponent))

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]."""
        return torch.Size((self.rows, self.columns))

    @property
    def grid(self) -> tuple[int, int]:
        """(NT, G), strips and groups of tiles."""
        return tile_grid(self.rows, self.columns, self.group)

    def nbytes(self) -> int:
        """Bytes in memory: planes, scales, gains, and the tile index with its two maps."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def dequantize(self, which: int = 0) -> Tensor:
        """The dense weight at its present levels, float32 [rows, columns]."""
        dense: Tensor = torch.ops.foveate.plane_unpack(self.tensors, self.form, which)
        return dense

    def kept(self, level_tiles: Tensor) -> PlaneTensor:
        """A copy that stores each tile only up to `level_tiles` (uint8 [NT, G]), and reads it there at most."""
        if bool((level_tiles > self.resident).any()):
            raise FoveateError("a tile cannot be kept at a level above the one it is stored for")
        old, new = self.resident.view(-1), level_tiles.reshape(-1)

        def gather(stored: Tensor, floor: int, width: int) -> Tensor:
            return stored.view(-1, width)[(new >= floor)[old >= floor]].view(-1)

        planes = tuple(gather(p, NESTED_LEVELS[i], tile_bytes(i, self.group)) for i, p in enumerate(self.planes))
        resident = level_tiles.clone()
        return replace(
            self,
            planes=planes,
            scales=gather(self.scales, 1, SCALE_BYTES),
            resident=resident,
            starts=tile_starts(resident),
            tags=torch.minimum(self.tags, resident),
        )


def from_codes(
    anchor_NK: Tensor, residual_NK: Tensor, scale_NG: Tensor, offset_NG: Tensor, gain: Tensor, *, group: int, reach: int
) -> PlaneTensor:
    """Pack rounded codes into planes, every plane stored and read.

    Args:
        anchor_NK: uint8 [N, K], the 4-bit codes.
        residual_NK: uint8 [N, K], the 4-bit codes of what the anchor leaves.
        scale_NG, offset_NG: floating point [N, G]; stored as the nearest that a byte each can hold.
        gain: float16 [2, 1] or [2, N], for levels 2 and 3.
        group: inputs a group.
        reach: widening of the residual planes.
    """
    check_group(group)
    rows, columns = anchor_NK.shape
    exponent = exponent_for(float(scale_NG.max()) if scale_NG.numel() else 0.0)
    resident = torch.full(tile_grid(rows, columns, group), TOP_LEVEL, dtype=torch.uint8)
    return PlaneTensor(
        planes=tuple(pack_plane(q, i, group).flatten() for i, q in enumerate(split_planes(anchor_NK, residual_NK))),
        scales=pack_scales(*encoded(scale_NG, offset_NG, exponent)).flatten(),
        gain=F.pad(gain, (0, -rows % TILE_ROWS)) if gain.shape[1] > 1 else gain,
        resident=resident,
        starts=tile_starts(resident),
        tags=resident.expand(2, -1, -1).clone(),
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
    choice: Tensor | None = None,
    order: Tensor | None = None,
    input_range: Tensor | None = None,
) -> list[Tensor]:
    """x [..., K] times each of the weights that share it; see the op `plane_linear`.

    Raises:
        FoveateError: x does not have K columns.
    """
    tensors, forms = weights[0].tensors, weights[0].form
    for w in weights[1:]:
        tensors, forms = tensors + w.tensors, forms + w.form  # type: ignore[assignment]
    if x.shape[-1] != forms[1]:
        raise FoveateError(f"x has {x.shape[-1]} columns, the weight {forms[1]}")
    op = torch.ops.foveate.plane_linear_no_grad
    if torch.is_grad_enabled() and (x.requires_grad or any(b.requires_grad for b in biases)):
        op = torch.ops.foveate.plane_linear
    if x.dtype == torch.float64:
        return [y.double() for y in op(x.float(), tensors, biases, forms, input_level, choice, order, input_range)]
    outputs: list[Tensor] = op(x, tensors, biases, forms, input_level, choice, order, input_range)
    return outputs


def gathered(tensors: Sequence[PlaneTensor]) -> list[PlaneTensor]:
    """The same weights with each plane, and the scales, and the tags of all of them side by side in one block, so that
    a plane can be given back whole.
    """
    kinds: list[Callable[[PlaneTensor], Tensor]] = [
        *(lambda w, p=p: w.planes[p] for p in range(PLANES)),
        lambda w: w.scales,
    ]
    moved: list[list[Tensor]] = []
    for pick in kinds:
        old = [pick(w) for w in tensors]
        new = arena([t.numel() * t.element_size() for t in old])
        for source, target in zip(old, new, strict=True):
            target.copy_(source.view(torch.uint8))
        moved.append([t.view(o.dtype) for t, o in zip(new, old, strict=True)])
    return shared_tags(
        [replace(w, planes=tuple(m[i] for m in moved[:PLANES]), scales=moved[PLANES][i]) for i, w in enumerate(tensors)]
    )


def shared_tags(tensors: Sequence[PlaneTensor]) -> list[PlaneTensor]:
    """The same weights with their tags one after the other in one block, so that a switch is one copy."""
    if not tensors:
        return []
    block = torch.cat([w.tags.reshape(-1) for w in tensors])
    parts = block.split([w.tags.numel() for w in tensors])
    return [replace(w, tags=part.view_as(w.tags)) for w, part in zip(tensors, parts, strict=True)]


def resident_bytes(level: int, tiles: int, group: int) -> int:
    """Bytes of planes and scales that `tiles` tiles take at a level."""
    per_tile = sum(tile_bytes(p, group) for p in range(planes_of(level))) + (SCALE_BYTES if level else 0)
    return tiles * per_tile
