"""What changes its form while it moves: ops that read their input and write their output by strips.

* `tile_order`: a plane whose rows lie one after another, to the order in which kernels read it. (Our own folders store
  planes in that order already, so that fetching them converts nothing.)
* `halves_to_planes`: weights of 16 bits to planes, scales and offsets, on the grid from each group's least to its
  greatest weight. What calibration chooses is better (docs/decisions.md); this is what can be had in passing.
* `fewer_bits`: packed keys and values from k to k/2, k/4, ... bits: the upper bits of each code, at the middle of the
  values that share them.

Shapes: N rows, K inputs, g inputs in a group; NT strips of 16 rows, G groups, B bytes of one plane of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import FoveateError, LevelError
from foveate.formats.grids import decoded, encoded, exponent_for
from foveate.formats.levels import PLANE_BITS
from foveate.formats.packing import pack_scales
from foveate.kernels.convert.reference import check_halves, check_tiles


def tile_order(rows_NB: Tensor, plane: int, group: int, out: Tensor | None = None) -> Tensor:
    """A plane from the order of rows to that of tiles.

    Args:
        rows_NB: uint8 [N, K * bits / 8], the codes of a row one after another, the first in the lowest bits. N is a
            multiple of 16 and K of `group`.
        plane: 0 to 4.
        group: inputs in a group.
        out: where the result goes; new memory if not given.

    Returns:
        uint8 [NT * G * B], as a `PlaneTensor` has it.

    Raises:
        FoveateError: the shape is not of whole tiles.
    """
    check_tiles(rows_NB.shape[0], rows_NB.shape[1] * 8 // PLANE_BITS[plane], group)
    out = torch.empty(rows_NB.numel(), dtype=torch.uint8) if out is None else out
    torch.ops.foveate.plane_to_tiles(rows_NB.contiguous(), plane, group, out)
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """Weights that were converted to planes, as `foveate.planes.PlaneTensor` has them, with reach 0 and gains of 1.

    Attributes:
        planes: five uint8 tensors, all tiles of each plane.
        scales: uint8, the scales and offsets of each tile.
        exponent: of the scales.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor
    exponent: int


def halves_to_planes(w_NK: Tensor, group: int, out: Sequence[Tensor] | None = None) -> Planes:
    """Weights of 16 bits to planes: each to the nearest of 256 steps between its group's least and greatest weight.

    Args:
        w_NK: float16 or bfloat16 [N, K]; N is a multiple of 16 and K of `group`.
        group: inputs in a group.
        out: where the planes go, uint8 1-D of the right sizes; new memory if not given.

    Raises:
        FoveateError: the dtype has not 16 bits, the shape is not of whole tiles, a weight is NaN or Inf, or two of a
            group are further apart than float32 can say.
    """
    check_halves(w_NK)
    check_tiles(w_NK.shape[0], w_NK.shape[1], group)
    w_NK = w_NK.contiguous()
    least, greatest = torch.ops.foveate.half_extremes(w_NK, group)
    # 255 steps of 8 bits, of which 4 bits, whose step is the scale, have a sixteenth
    scale = (greatest - least).clamp_min_(2.0**-24) * (16 / 255)
    largest = float(scale.max()) if scale.numel() else 0.0
    if not math.isfinite(largest):
        raise FoveateError("the weights hold NaN or Inf, or values whose distance is beyond float32")
    exponent = exponent_for(largest)
    codes = encoded(scale, (greatest + least) / 2, exponent)
    scale, offset = decoded(*codes, exponent)
    if out is None:
        out = [torch.empty(w_NK.numel() * bits // 8, dtype=torch.uint8) for bits in PLANE_BITS]
    torch.ops.foveate.halves_to_planes(w_NK, offset, 16 / scale.clamp_min(2.0**-60), group, list(out))
    return Planes(planes=tuple(out), scales=pack_scales(*codes).flatten(), exponent=exponent)


def fewer_bits(
    codes: Tensor, ranges_G2: Tensor, level: int, target: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed numbers at fewer bits: the upper bits of each code, at the middle of the values that share them.

        codes, ranges = fewer_bits(codes, ranges, level=8, target=4)

    Args:
        codes: uint8 1-D, packed codes (docs/format.md, "Saved tensors"), a whole number of 32-bit words.
        ranges_G2: bfloat16 [G, 2], the low end and the step of each group.
        level: bits of a code now: 16, 8 or 4.
        target: bits of a code afterwards: 8, 4 or 2, fewer than `level`.
        out: where the codes go, uint8 1-D of the right size; new memory if not given.

    Returns:
        The codes and ranges at `target` bits. A number is off by at most half a step more than it was, and by what
        bfloat16 rounds off the low end.

    Raises:
        LevelError: the levels are none of those.
    """
    if level not in (16, 8, 4) or target not in (8, 4, 2) or target >= level:
        raise LevelError(f"level (={level}) and target (={target}) are not of 16, 8, 4, 2 with target below level")
    dropped = level - target
    step = ranges_G2[:, 1].float()
    low = ranges_G2[:, 0].float() + step * (((1 << dropped) - 1) / 2)
    ranges = torch.stack([low, step * (1 << dropped)], dim=1).to(torch.bfloat16)
    codes = codes.contiguous()
    while level > target:
        last = level == 2 * target
        halved = out if last and out is not None else torch.empty(codes.numel() // 2, dtype=torch.uint8)
        torch.ops.foveate.upper_halves(codes, level, halved)
        codes, level = halved, level // 2
    return codes, ranges
