"""What changes its form while it moves: each conversion reads its input once and writes its output once, by blocks.

* `tile_order`: a plane whose rows lie one after another, to the order in which kernels read it. (Our own folders store
  planes in that order already, so that fetching them converts nothing.)
* `halves_to_planes`: weights of 16 bits to planes, scales and offsets, on the grid from each group's least to its
  greatest weight. What calibration chooses is better (docs/decisions.md); this is what can be had in passing.
* `fewer_bits`: packed keys and values from k to k/2, k/4, ... bits: the upper bits of each code, at the middle of the
  values that share them.

Bits are moved in whole 32-bit words: four codes of neighbouring inputs are one word, and so is a row's share of a chunk
(docs/format.md, "Tiles").

Shapes: N rows, K inputs, g inputs in a group; NT strips of 16 rows, G groups, B bytes of one plane of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import FoveateError, LevelError
from foveate.formats.grids import decoded, encoded, exponent_for
from foveate.formats.levels import PLANE_BITS
from foveate.formats.packing import TILE_ROWS, check_group, pack_scales

#: Weights that are converted at a time: they stay in the processor's cache from one step to the next.
BLOCK = 1 << 17
_WORD_BITS = 32
#: Which bits of a field's number within a word are exchanged, one pair after the other, by the bits of a field:
#: 2-bit fields go from (j, i) to (i, j), 1-bit fields from (o, j, i) to (i, j, o), each of j and i two bits.
_SWAPS = {2: ((3, 1), (2, 0)), 1: ((4, 1), (3, 0), (2, 0), (1, 0))}


def _swapped(words: Tensor, bits: int) -> Tensor:
    """Words whose fields are in the order of columns, with their fields in the order of a tile; int32."""
    fields = _WORD_BITS // bits
    for high, low in _SWAPS[bits]:
        shift = ((1 << high) - (1 << low)) * bits
        mask = 0
        for field in range(fields):
            if field >> low & 1 and not field >> high & 1:
                mask |= ((1 << bits) - 1) << bits * field
        moved = words >> shift
        moved ^= words
        moved &= mask - (1 << 32) if mask >> 31 else mask
        words = words ^ moved
        moved <<= shift
        words ^= moved
    return words


def _words_to_tiles(words: Tensor, group: int, bits: int) -> Tensor:
    """Words [rows, K / fields] -> int32 [strips, G, chunks, 16]; rows fill whole strips, and K whole groups."""
    chunks = group * bits // _WORD_BITS
    return words.view(-1, TILE_ROWS, words.shape[1] // chunks, chunks).permute(0, 2, 3, 1)


def tile_order(rows_NB: Tensor, plane: int, group: int) -> Tensor:
    """A plane from the order of rows to that of tiles.

    Args:
        rows_NB: uint8 [N, K * bits / 8], the codes of a row one after another, the first in the lowest bits. N is a
            multiple of 16 and K of `group`.
        plane: 0 to 4.
        group: inputs in a group.

    Returns:
        uint8 [NT * G * B], as a `PlaneTensor` has it.

    Raises:
        FoveateError: the shape is not of whole tiles.
    """
    bits = PLANE_BITS[plane]
    rows, size = rows_NB.shape
    columns = size * 8 // bits
    if rows % TILE_ROWS or columns % check_group(group):
        raise FoveateError(f"{rows} rows of {columns} inputs are not whole tiles of {TILE_ROWS} x {group}")
    out = torch.empty(rows * size, dtype=torch.uint8)
    words, target = rows_NB.view(torch.int32), out.view(torch.int32).view(rows // TILE_ROWS, -1)
    step = max(BLOCK // max(columns * TILE_ROWS, 1), 1)
    for strip in range(0, rows // TILE_ROWS, step):
        part = words[strip * TILE_ROWS : (strip + step) * TILE_ROWS]
        tiles = _words_to_tiles(_swapped(part, bits), group, bits)
        target[strip : strip + step].view(tiles.shape).copy_(tiles)
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


def halves_to_planes(w_NK: Tensor, group: int) -> Planes:
    """Weights of 16 bits to planes: each to the nearest of 256 steps between its group's least and greatest weight.

    Args:
        w_NK: float16 or bfloat16 [N, K], finite; N is a multiple of 16 and K of `group`.
        group: inputs in a group.

    Raises:
        FoveateError: the dtype has not 16 bits, or the shape is not of whole tiles.
    """
    rows, columns = w_NK.shape
    if w_NK.dtype not in (torch.float16, torch.bfloat16):
        raise FoveateError(f"dtype (={w_NK.dtype}) is not float16 or bfloat16")
    if rows % TILE_ROWS or columns % check_group(group):
        raise FoveateError(f"{rows} rows of {columns} inputs are not whole tiles of {TILE_ROWS} x {group}")
    groups = columns // group
    step = max(BLOCK // max(columns * TILE_ROWS, 1), 1) * TILE_ROWS
    least, greatest = (torch.empty(rows, groups) for _ in range(2))
    for row in range(0, rows, step):
        low, high = w_NK[row : row + step].view(-1, groups, group).aminmax(dim=2)
        least[row : row + step], greatest[row : row + step] = low, high
    # 255 steps of 8 bits, of which 4 bits, whose step is the scale, have a sixteenth
    scale = (greatest - least).clamp_min_(2.0**-24) * (16 / 255)
    exponent = exponent_for(float(scale.max()) if scale.numel() else 0.0)
    codes = encoded(scale, (greatest + least) / 2, exponent)
    scale, offset = decoded(*codes, exponent)
    inverse = 16 / scale.clamp_min(2.0**-60)
    planes = tuple(torch.empty(rows * columns * bits // 8, dtype=torch.uint8) for bits in PLANE_BITS)
    for row in range(0, rows, step):
        part = w_NK[row : row + step].view(-1, groups, group).float()
        part.sub_(offset[row : row + step, :, None]).mul_(inverse[row : row + step, :, None]).add_(127.5)
        bytes_ = part.round_().clamp_(0, 255).to(torch.uint8)
        words = bytes_.view(torch.int32).view(len(part), -1)  # four codes of neighbouring inputs each
        for plane, out in enumerate(planes):
            bits = PLANE_BITS[plane]
            tiles = _words_to_tiles(_plane_words(words, plane), group, bits)
            size = row * columns * bits // 8
            out[size : size + tiles.numel() * 4].view(torch.int32).view(tiles.shape).copy_(tiles)
    return Planes(planes=planes, scales=pack_scales(*codes).flatten(), exponent=exponent)


#: How far the bits of each plane are from the lowest of an 8-bit code.
_SHIFTS = (6, 5, 4, 2, 0)


def _plane_words(words: Tensor, plane: int) -> Tensor:
    """One plane of 8-bit codes: int32 words of four codes [n, K / 4] -> words of a tile's order [n, K * bits / 32]."""
    bits, shift = PLANE_BITS[plane], _SHIFTS[plane]
    mask = 0x03030303 if bits == 2 else 0x01010101
    of_chunk = words.view(words.shape[0], -1, 4 if bits == 2 else 8)
    out: Tensor | None = None
    for number in range(of_chunk.shape[2]):
        place = 2 * number if bits == 2 else 2 * (number % 4) + number // 4
        field = of_chunk[:, :, number] >> shift
        field &= mask
        field <<= place
        out = field if out is None else out.bitwise_or_(field)
    assert out is not None
    return out


def fewer_bits(codes: Tensor, ranges_G2: Tensor, level: int, target: int) -> tuple[Tensor, Tensor]:
    """Packed numbers at fewer bits: the upper bits of each code, at the middle of the values that share them.

        codes, ranges = fewer_bits(codes, ranges, level=8, target=4)

    Args:
        codes: uint8 1-D, packed codes (docs/format.md, "Saved tensors"), a whole number of 32-bit words.
        ranges_G2: bfloat16 [G, 2], the low end and the step of each group.
        level: bits of a code now: 16, 8 or 4.
        target: bits of a code afterwards: 8, 4 or 2, fewer than `level`.

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
    while level > target:
        codes = _halved(codes, level)
        level //= 2
    return codes, ranges


def _halved(codes: Tensor, level: int) -> Tensor:
    """Codes of `level` bits to their upper halves."""
    out = torch.empty(codes.numel() // 2, dtype=torch.uint8)
    pairs = codes.view(torch.int16)
    half = level // 2
    for begin in range(0, len(pairs), BLOCK):
        x = pairs[begin : begin + BLOCK]
        if level == 16:
            out[begin : begin + BLOCK] = x.view(torch.uint8)[1::2]
            continue
        found: Tensor | None = None
        for field in range(16 // level):
            part = x >> (level * field + half - half * field) if field else x >> half
            part &= ((1 << half) - 1) << half * field
            found = part if found is None else found.bitwise_or_(part)
        assert found is not None
        out[begin : begin + BLOCK] = found.view(torch.uint8)[::2]
    return out
