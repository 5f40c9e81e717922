"""The meaning of every op, in plain torch.

Written to be read beside docs/format.md, not to be fast. The integer sums of a group are exact (float64 holds them),
and groups are added in ascending order with one rounding each, as the compiled kernels do it with a fused multiply-add.
It also runs where no compiler is found.

A weight is its ten tensors (five planes, scales, gain, starts, resident, tags) and its form, five numbers (rows,
columns, inputs a group, reach, exponent of the scales); several weights are their tensors and forms one after the
other.

Shapes: M rows of x, N rows and K inputs of a weight, g inputs a group, NT strips of 16 rows, G groups, T = NT * G
    tiles.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.formats.grids import decoded
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS, PLANES, check_input_level, code_range, code_step
from foveate.formats.packing import SCALE_BYTES, TILE_ROWS, tile_bytes, tiles_to_matrix, unpack_plane

#: The greatest code of symmetric levels; a block of level 4 has 0..15 around a zero point.
INPUT_RANGE = {8: 127.0, 16: 32512.0}
LEVEL_4_CODES = 15
#: Inputs of level 4 that share a step and a zero point, and the most units that a step has.
BLOCK = 32
BLOCK_UNITS = 8
#: Levels at which a range that was given stands for each row's own.
STATIC_LEVELS = (4, 8)
WEIGHT_TENSORS = PLANES + 5
GEOMETRY_NUMBERS = 5


class Weight(NamedTuple):
    """A weight as the ops take it; `PlaneTensor` has the meaning of each."""

    planes: Sequence[Tensor]
    scales: Tensor
    gain: Tensor
    tile_offsets: Tensor
    stored_levels: Tensor
    active_levels: Tensor
    rows: int
    columns: int
    group: int
    reach: int
    exponent: int


def weights_of(tensors: Sequence[Tensor], geometries: Sequence[int]) -> list[Weight]:
    """The weights of a list of tensors and one of numbers."""
    weights = []
    for i in range(len(geometries) // GEOMETRY_NUMBERS):
        mine = tensors[i * WEIGHT_TENSORS : (i + 1) * WEIGHT_TENSORS]
        scales, gain, tile_offsets, stored_levels, active_levels = mine[PLANES:]
        geometry = geometries[i * GEOMETRY_NUMBERS : (i + 1) * GEOMETRY_NUMBERS]
        weights.append(Weight(mine[:PLANES], scales, gain, tile_offsets, stored_levels, active_levels, *geometry))
    return weights


def _spread(stored: Tensor, has_it: Tensor) -> Tensor:
    """Put stored tiles [S, B] at their places among all tiles [T, B], zeros elsewhere."""
    full = stored.new_zeros(has_it.numel(), stored.shape[1])
    full[has_it.view(-1)] = stored
    return full


def _centred_codes(
    planes: Sequence[Tensor], stored_levels: Tensor, level_tiles: Tensor, group: int, reach: int
) -> Tensor:
    """2c - C of every tile at its level, int64 [NT, G, 16, g]; 0 where the level is 0."""
    strips, groups = stored_levels.shape
    q = []
    for plane, packed in enumerate(planes):
        has_it = stored_levels >= NESTED_LEVELS[plane]
        stored = packed.view(-1, tile_bytes(plane, group))
        q.append(unpack_plane(_spread(stored, has_it), plane, group).view(strips, groups, TILE_ROWS, group).long())
    anchor = q[0] << 2 | q[1] << 1 | q[2]
    residual = q[3] << 2 | q[4]
    code_at = {
        2: q[0],
        3: anchor >> 1,
        4: anchor,
        6: (anchor << (2 - reach)) + q[3],
        8: (anchor << (4 - reach)) + residual,
    }
    out = torch.zeros_like(anchor)
    for level, code in code_at.items():
        out = torch.where(level_tiles[..., None, None] == level, 2 * code - code_range(level, reach), out)
    return out


def _scales(w: Weight, level_tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(scale x unit, offset) of every tile's rows at its level, float32 [NT, G, 16] each; 0 where the level is 0."""
    strips, groups = w.stored_levels.shape
    codes = _spread(w.scales.view(-1, SCALE_BYTES), w.stored_levels > 0).view(strips, groups, 2, TILE_ROWS)
    scale, offset = decoded(codes[:, :, 0], codes[:, :, 1].view(torch.int8), w.exponent)
    gain_by_strip = w.gain.float().expand(len(GAINED_LEVELS), strips * TILE_ROWS).view(-1, strips, 1, TILE_ROWS)
    scaled = torch.zeros_like(scale)
    for i, level in enumerate(NESTED_LEVELS):
        unit = torch.full_like(gain_by_strip[0], 0.5 * code_step(level, w.reach))
        if level in GAINED_LEVELS:
            unit *= gain_by_strip[i]
        scaled = torch.where(level_tiles[..., None] == level, scale * unit, scaled)
    return scaled, torch.where(level_tiles[..., None] > 0, offset, 0.0)


def _levels_read(active_levels: Tensor, stored_levels: Tensor, which: int) -> Tensor:
    return torch.minimum(active_levels[which], stored_levels)


def plane_unpack(weight: Sequence[Tensor], geometry: Sequence[int], which: int = 0) -> Tensor:
    """The dense weight, float32 [rows, columns], at the levels of map `which`."""
    (w,) = weights_of(weight, geometry)
    return tiles_to_matrix(_dense_tiles(w, which), w.rows, w.columns).contiguous()


def _dense_tiles(w: Weight, which: int) -> Tensor:
    level_tiles = _levels_read(w.active_levels, w.stored_levels, which)
    centred = _centred_codes(w.planes, w.stored_levels, level_tiles, w.group, w.reach)
    scaled, offset = _scales(w, level_tiles)
    # one rounding, as a fused multiply-add has
    return (centred.double() * scaled.double()[..., None] + offset.double()[..., None]).float()


def plane_embedding(
    indices: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor | None = None
) -> Tensor:
    """Rows of the dense weight, float32 [*indices.shape, columns], each at the (higher) map of its pair."""
    out = weight[0].new_empty(indices.numel(), geometry[1], dtype=torch.float32)
    maps = None if maps is None else maps[:, 1:].expand(-1, 2)
    for which, mine in _rows_of_maps(maps, indices.numel()):
        out[mine] = F.embedding(indices.reshape(-1)[mine], plane_unpack(weight, geometry, which))
    return out.view(*indices.shape, geometry[1])


def plane_linear_backward(
    dy: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor | None = None
) -> Tensor:
    """The gradient of x [M, columns] from that of y [M, rows], at the levels that each row of x read."""
    if maps is None:
        dense: Tensor = torch.ops.foveate.plane_unpack(weight, geometry, 0)
        return dy @ dense
    dx = dy.new_empty(len(dy), geometry[1])
    for which, mine in _rows_of_maps(maps, len(dy)):
        dx[mine] = dy[mine] @ torch.ops.foveate.plane_unpack(weight, geometry, which)
    return dx


def _rows_of_maps(maps: Tensor | None, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each map that rows read, and which rows those are (bool [count])."""
    if maps is None:
        yield 0, torch.ones(count, dtype=torch.bool)
        return
    if maps.shape != (count, 2) or maps.dtype != torch.uint8:
        raise RuntimeError(f"maps are {maps.dtype} {list(maps.shape)}, not uint8 [{count}, 2]")
    if not torch.equal(maps[:, 0], maps[:, 1]):
        raise RuntimeError("a row reads one of two maps, and nothing says which")
    for which in maps[:, 0].unique().tolist():
        yield which, maps[:, 0] == which


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


def _product(
    x_MK: Tensor, centred: Tensor, scaled: Tensor, offset: Tensor, level: int, input_range: Tensor | None
) -> Tensor:
    """[M, NT * 16] outputs of quantized inputs, by exact group sums added in order."""
    strips, groups, _, group = centred.shape
    codes, x_scale = quantize_input(x_MK, level, input_range)
    x_GMg = F.pad(codes.double(), (0, groups * group - codes.shape[1])).view(-1, groups, group).transpose(0, 1)
    w_GgN = centred.permute(1, 3, 0, 2).reshape(groups, group, strips * TILE_ROWS).double()
    acc = torch.zeros(len(x_MK), strips * TILE_ROWS)
    for gi in range(groups):
        dots = (x_GMg[gi] @ w_GgN[gi]).float()
        sums = x_GMg[gi].sum(1, keepdim=True).float()
        acc = (dots.double() * scaled[:, gi].reshape(-1) + acc).float()
        acc = (sums.double() * offset[:, gi].reshape(-1) + acc).float()
    return acc * x_scale


def product_at(x_MK: Tensor, w: Weight, which: int, level: int, input_range: Tensor | None) -> Tensor:
    """[M, NT * 16] outputs of inputs that are quantized at `level`, with the weight as map `which` reads it."""
    levels = _levels_read(w.active_levels, w.stored_levels, which)
    centred = _centred_codes(w.planes, w.stored_levels, levels, w.group, w.reach)
    scaled, offset = _scales(w, levels)
    return _product(x_MK, centred, scaled, offset, level, input_range)


def plane_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    geometries: Sequence[int],
    input_level: Tensor,
    maps: Tensor | None = None,
    order: Tensor | None = None,
    input_range: Tensor | None = None,
) -> list[Tensor]:
    """x [..., K] times each weight of a list that shares it: one [..., rows] a weight, in the dtype of x."""
    x_MK = x.reshape(-1, x.shape[-1]).float()
    if order is not None:
        x_MK = x_MK[:, order]
    outputs = []
    for w, bias in zip(weights_of(weights, geometries), biases, strict=True):
        y_MN = x_MK.new_empty(len(x_MK), w.stored_levels.shape[0] * TILE_ROWS)
        for which, mine in _rows_of_maps(maps, len(x_MK)):
            level = check_input_level(int(input_level[which]))
            if level == 32:
                dense = tiles_to_matrix(_dense_tiles(w, which), y_MN.shape[1], x_MK.shape[1])
                y_MN[mine] = F.linear(x_MK[mine], dense)
            else:
                y_MN[mine] = product_at(x_MK[mine], w, which, level, input_range)
        y_MN = y_MN[:, : w.rows]
        if bias.numel():
            y_MN = y_MN + bias
        outputs.append(y_MN.to(x.dtype).reshape(*x.shape[:-1], w.rows))
    return outputs


class _Held(NamedTuple):
    tensors: Sequence[Tensor]
    geometries: Sequence[int]
    input_levels: Sequence[Tensor]
    input_ranges: Sequence[Tensor]
    places: Sequence[int]
    inputs: Sequence[int]


_HELD: dict[int, _Held] = {}
_NUMBERS = itertools.count(1)


def plane_handle(
    weights: Sequence[Tensor],
    geometries: Sequence[int],
    input_levels: Sequence[Tensor],
    input_ranges: Sequence[Tensor],
    places: Sequence[int],
    inputs: Sequence[int],
) -> Tensor:
    """A tensor, int64 [1], that stands for weights which share an input, as long as it lives.

    Args:
        weights, geometries: of the weights.
        input_levels, input_ranges: of the input of each, which count outside of any model. Without ranges each row has
            its own.
        places, inputs: the numbers of each weight and of each input in their model; empty outside of any.
    """
    number = next(_NUMBERS)
    _HELD[number] = _Held(
        tuple(weights), tuple(geometries), tuple(input_levels), tuple(input_ranges), tuple(places), tuple(inputs)
    )
    handle = torch.tensor([number])
    weakref.finalize(handle, _HELD.pop, number)
    return handle


def rows_of_handle(handle: Tensor) -> list[int]:
    """The rows of each weight that a handle of this reference stands for."""
    return list(_HELD[int(handle)].geometries[::GEOMETRY_NUMBERS])


def plane_linear_by_handle(
    x: Tensor,
    handle: Tensor,
    book: Tensor | None,
    owners: Tensor | None,
    biases: Sequence[Tensor],
    rows: Sequence[int],
) -> list[Tensor]:
    """x [..., K] times each weight that a handle stands for, each with its own input level and range.

    Args:
        x: [..., K].
        handle: of the weights.
        book: of the model; None outside of any.
        owners: int64, for each row of x the row of the pass that it belongs to; None if that follows from its shape.
        biases: none, or one for each weight, which may itself be empty.
        rows: those of the weights.
    """
    if int(handle) not in _HELD:
        raise RuntimeError(f"handle (={int(handle)}) stands for no weight of this process: its weight is gone")
    held = _HELD[int(handle)]
    own_rows = rows_of_handle(handle)
    if list(rows) != own_rows:
        raise RuntimeError(f"rows (={list(rows)}) are not those of the weights, {own_rows}")
    ops = torch.ops.foveate
    maps = None if book is None else ops.pass_rows(book, x, 1, owners)
    outputs = []
    for i, level in enumerate(held.input_levels):
        weight = held.tensors[i * WEIGHT_TENSORS : (i + 1) * WEIGHT_TENSORS]
        geometry = held.geometries[i * GEOMETRY_NUMBERS : (i + 1) * GEOMETRY_NUMBERS]
        limits = held.input_ranges[i] if held.input_ranges else None
        if book is not None:
            strips, groups = weight[-1].shape[1:]
            weight = (*weight[:-1], ops.pass_levels(book, held.places[i], strips, groups))
            level, limits = ops.pass_input(book, held.inputs[i])
        bias, own = biases[i] if biases else torch.empty(0), maps
        if book is not None:
            own = ops.pass_choice(book, [held.places[i], held.inputs[i]], x, weight, geometry, maps)
        outputs += plane_linear(x, weight, [bias], geometry, level, own, input_range=limits)
    return outputs
