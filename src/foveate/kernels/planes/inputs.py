"""The meaning of how rows of inputs become codes, in plain torch; docs/format.md, "Inputs".

Symmetric at 8 and 16 bits; at 4 bits with a zero point, and a step for each block of 32 values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: The greatest code of symmetric levels; a block of level 4 has 0..15 around a zero point.
INPUT_RANGE = {8: 127.0, 16: 32512.0}
LEVEL_4_CODES = 15
#: Inputs of level 4 that share a step and a zero point, and the most units that a step has.
BLOCK = 32
BLOCK_UNITS = 8
#: Levels at which a range that was given stands for each row's own.
STATIC_LEVELS = (4, 8)


class Grid(NamedTuple):
    """How values become codes: code = round(x * inverse) within least..most, and x ~ code * step."""

    inverse: Tensor
    step: Tensor
    least: Tensor
    most: Tensor


def _step(low: Tensor, high: Tensor) -> Tensor:
    """The step that 16 codes need from `low` (at most 0) to `high` (at least 0)."""
    return high / LEVEL_4_CODES - low / LEVEL_4_CODES


def _grid_from(low: Tensor, inverse: Tensor, step: Tensor) -> Grid:
    """16 codes around a zero point."""
    zero = torch.round(-low * inverse).clamp_max(LEVEL_4_CODES)
    return Grid(inverse, step, -zero, LEVEL_4_CODES - zero)


def _grid(low: Tensor, high: Tensor, level: int) -> Grid:
    """One grid for values from `low` to `high`."""
    if level == 4:
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = _step(low, high)
        return _grid_from(low, torch.tensor(1.0) / step, step)
    # a number divided by a tensor would round twice
    q_max = torch.tensor(INPUT_RANGE[level])
    largest = torch.maximum(low.abs(), high.abs())
    return Grid(q_max / largest, largest / INPUT_RANGE[level], -q_max, q_max)


def _codes(x: Tensor, grid: Grid) -> Tensor:
    return torch.minimum(torch.maximum(torch.round(x * grid.inverse), grid.least), grid.most)


def block_codes(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of level 4 in units of the row [M, K], and the unit [M, 1]: each block has a zero point, and a step of 1 to
    8 units. For finite rows; NaN where all is zero.
    """
    rows, columns = x_MK.shape
    blocks = -(-columns // BLOCK)
    x_MBb = F.pad(x_MK, (0, blocks * BLOCK - columns)).view(rows, blocks, BLOCK)
    low, high = x_MBb.amin(2, keepdim=True).clamp_max(0), x_MBb.amax(2, keepdim=True).clamp_min(0)
    step = _step(low, high)
    unit = step.amax(1, keepdim=True) / BLOCK_UNITS
    inverse = torch.tensor(1.0) / unit
    times = torch.ceil(step * inverse).clamp(1, BLOCK_UNITS)
    codes = _codes(x_MBb, _grid_from(low, inverse / times, unit)) * times
    return codes.view(rows, blocks * BLOCK)[:, :columns], unit[:, :, 0]


def quantize_input(x_MK: Tensor, level: int, input_range: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of each row: symmetric at 8 and 16 bits; at 4 bits with a zero point and a step for each block of 32.

    Args:
        x_MK: float32 [M, K].
        level: 4, 8 or 16 bits.
        input_range: float32 [2], the least and greatest value that codes of levels 4 and 8 reach, beyond which values
            are cut off. Where it is not given, holds NaN or Inf, or nothing but zero, each row has its own; and always
            at 16.

    Returns:
        Codes float32 [M, K], integers of at most 127 (32512 at 16 bits), 0 for 0; and the scale of each row float32
        [M, 1]: NaN where the row has a value that is not finite, 0 where it is all zeros.
    """
    finite = torch.isfinite(x_MK).all(1, keepdim=True)
    fixed = _fixed_grid(level, input_range)
    if fixed is not None:
        codes, scale = _codes(x_MK, fixed), fixed.step.expand(len(x_MK), 1)
        usable = finite
    elif not x_MK.shape[1]:
        return x_MK, x_MK.new_zeros(len(x_MK), 1)
    elif level == 4:
        codes, scale = block_codes(x_MK)
        usable = finite & torch.isfinite(torch.tensor(1.0) / scale)
    else:
        grid = _grid(x_MK.amin(1, keepdim=True), x_MK.amax(1, keepdim=True), level)
        codes, scale = _codes(x_MK, grid), grid.step
        usable = finite & torch.isfinite(grid.inverse)
    return torch.where(usable, codes, 0.0), torch.where(finite, torch.where(usable, scale, 0.0), torch.nan)


def _fixed_grid(level: int, input_range: Tensor | None) -> Grid | None:
    """The grid of all rows, if a range that is one was given."""
    if input_range is None or level not in STATIC_LEVELS or not bool(torch.isfinite(input_range).all()):
        return None
    grid = _grid(input_range[0].view(1, 1), input_range[1].view(1, 1), level)
    return grid if bool(torch.isfinite(grid.inverse)) else None
