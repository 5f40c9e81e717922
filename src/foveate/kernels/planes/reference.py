"""The meaning of every op, in plain torch.

Written to be read beside docs/format.md, not to be fast. The integer sums of a group are exact (float64 holds them),
and groups are added in ascending order with one rounding each, as the compiled kernels do it with a fused multiply-add.
It also runs where no compiler is found.

A weight is its thirteen tensors (five planes, scales, gain, tile offsets, stored levels, the values, numbers and
offsets of its exact tiles, active levels) and its geometry, five numbers (rows, columns, inputs a group, reach,
exponent of the scales); several weights are their tensors and geometries one after the other.

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
from foveate.formats.levels import (
    ANCHOR_STEPS,
    GAINED_LEVELS,
    NESTED_LEVELS,
    PLANES,
    TOP_LEVEL,
    check_input_level,
    code_range,
    code_step,
)
from foveate.formats.packing import SCALE_BYTES, TILE_ROWS, tile_bytes, tiles_to_matrix, unpack_plane
from foveate.kernels.planes.inputs import quantize_input

WEIGHT_TENSORS = PLANES + 8
GEOMETRY_NUMBERS = 5


class Weight(NamedTuple):
    """A weight as the ops take it; `PlaneTensor` has the meaning of each."""

    planes: Sequence[Tensor]
    scales: Tensor
    gain: Tensor
    tile_offsets: Tensor
    stored_levels: Tensor
    exact_values: Tensor
    exact_tiles: Tensor
    exact_offsets: Tensor
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
        geometry = geometries[i * GEOMETRY_NUMBERS : (i + 1) * GEOMETRY_NUMBERS]
        weights.append(Weight(mine[:PLANES], *mine[PLANES:], *geometry))  # type: ignore[arg-type]
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
        6: ANCHOR_STEPS[reach] // 4 * anchor + q[3],
        8: ANCHOR_STEPS[reach] * anchor + residual,
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
    """The level at which the planes of each tile are read: 0 where exact values are read in their place."""
    active = active_levels[which]
    return torch.where(active > TOP_LEVEL, 0, torch.minimum(active, stored_levels))


def _exact_tiles(w: Weight, which: int) -> Iterator[tuple[int, int, Tensor]]:
    """(strip, group, values float32 [g, 16]) of each exact tile that map `which` reads as such, in order."""
    ends = w.exact_offsets.tolist()
    values = w.exact_values.view(-1, w.group, TILE_ROWS)
    for strip, (begin, end) in enumerate(itertools.pairwise(ends)):
        for tile in range(begin, end):
            group = int(w.exact_tiles[tile]) - strip * w.stored_levels.shape[1]
            if int(w.active_levels[which, strip, group]) > TOP_LEVEL:
                yield strip, group, values[tile].float()


def plane_unpack(weight: Sequence[Tensor], geometry: Sequence[int], which: int = 0) -> Tensor:
    """The dense weight, float32 [rows, columns], at the levels of map `which`."""
    (w,) = weights_of(weight, geometry)
    return tiles_to_matrix(_dense_tiles(w, which), w.rows, w.columns).contiguous()


def _dense_tiles(w: Weight, which: int) -> Tensor:
    level_tiles = _levels_read(w.active_levels, w.stored_levels, which)
    centred = _centred_codes(w.planes, w.stored_levels, level_tiles, w.group, w.reach)
    scaled, offset = _scales(w, level_tiles)
    # one rounding, as a fused multiply-add has
    dense = (centred.double() * scaled.double()[..., None] + offset.double()[..., None]).float()
    for strip, gi, values_gR in _exact_tiles(w, which):
        dense[strip, gi] = values_gR.t()
    return dense


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


def product_at(x_MK: Tensor, w: Weight, which: int, level: int, input_range: Tensor | None) -> Tensor:
    """[M, NT * 16] outputs of inputs that are quantized at `level`, with the weight as map `which` reads it: exact sums
    of groups, then products of exact tiles, added in order.
    """
    levels = _levels_read(w.active_levels, w.stored_levels, which)
    centred = _centred_codes(w.planes, w.stored_levels, levels, w.group, w.reach)
    scaled, offset = _scales(w, levels)
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
    for strip, gi, values_gR in _exact_tiles(w, which):
        mine = acc[:, strip * TILE_ROWS : (strip + 1) * TILE_ROWS]
        for x_M, value_R in zip(x_GMg[gi].t(), values_gR.double(), strict=True):
            mine.copy_((x_M[:, None] * value_R + mine).float())
    return acc * x_scale


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
