"""The meaning of the ops that change the form of what moves, in plain torch.

Bits are moved in whole 32-bit words: four codes of neighbouring inputs are one word, and so is a row's share of a chunk
(docs/format.md, "Tiles").

Legend: N rows, K inputs, g inputs in a group, G = K / g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import FoveateError, LevelError
from foveate.formats.levels import PLANE_BITS, PLANES
from foveate.formats.packing import TILE_ROWS, check_group

_WORD_BITS = 32
#: Which bits of a field's number within a word are exchanged, one pair after the other, by the bits of a field:
#: 2-bit fields go from (j, i) to (i, j), 1-bit fields from (o, j, i) to (i, j, o), each of j and i two bits.
_SWAPS = {2: ((3, 1), (2, 0)), 1: ((4, 1), (3, 0), (2, 0), (1, 0))}
#: How far the bits of each plane are from the lowest of an 8-bit code.
_SHIFTS = (6, 5, 4, 2, 0)


def plane_to_tiles(rows_NB: Tensor, plane: int, group: int, out: Tensor) -> None:
    """A plane from the order of rows to that of tiles.

    Args:
        rows_NB: uint8 [N, K * bits / 8], contiguous: the codes of a row one after another, the first in the lowest
            bits. N is a multiple of 16 and K of `group`.
        plane: 0 to 4.
        group: inputs in a group.
        out: uint8 [N * K * bits / 8], which becomes a plane as a `PlaneTensor` has it.

    Raises:
        FoveateError: the plane is none, the shape is not of whole tiles, or `out` has another one.
    """
    if not 0 <= plane < PLANES:
        raise FoveateError(f"plane (={plane}) is not one of 0 to {PLANES - 1}")
    bits = PLANE_BITS[plane]
    rows, size = rows_NB.shape
    check_tiles(rows, size * 8 // bits, group)
    _check_out(out, rows_NB.numel())
    if rows_NB.numel():
        words = _in_tile_order(rows_NB.clone(memory_format=torch.contiguous_format).view(torch.int32), bits)
        _write(out, _words_to_tiles(words, group, bits))


def half_extremes(w_NK: Tensor, group: int) -> Tensor:
    """The least and the greatest weight of each group.

    Args:
        w_NK: float16 or bfloat16 [N, K]; N is a multiple of 16 and K of `group`.
        group: inputs in a group.

    Returns:
        float32 [2, N, G]; NaN in rows that hold a weight that is not finite.

    Raises:
        FoveateError: the dtype has not 16 bits, or the shape is not of whole tiles.
    """
    check_halves(w_NK)
    rows, columns = w_NK.shape
    check_tiles(rows, columns, group)
    w_NGg = w_NK.float().view(rows, columns // group, group)
    least, greatest = w_NGg.aminmax(dim=2)
    finite_N1 = w_NK.isfinite().all(1, keepdim=True)
    return torch.stack([torch.where(finite_N1, end, torch.nan) for end in (least, greatest)])


def halves_to_planes(w_NK: Tensor, offset_NG: Tensor, inverse_NG: Tensor, group: int, out: Sequence[Tensor]) -> None:
    """The planes of the codes round((w - offset) * inverse + 127.5), within 0 to 255.

    Args:
        w_NK: finite, otherwise as for `half_extremes`.
        offset_NG, inverse_NG: float32, of each group.
        group: inputs in a group.
        out: five uint8 tensors, which become all tiles of each plane, as a `PlaneTensor` has them.

    Raises:
        FoveateError: as for `half_extremes`, or one of the others has another shape.
    """
    check_halves(w_NK)
    rows, columns = w_NK.shape
    check_tiles(rows, columns, group)
    for t in (offset_NG, inverse_NG):
        if t.dtype != torch.float32 or t.shape != (rows, columns // group):
            raise FoveateError(f"offset and inverse (={t.dtype} {list(t.shape)}) are not float32 [N, G]")
    for one, bits in zip(out, PLANE_BITS, strict=True):
        _check_out(one, w_NK.numel() * bits // 8)
    if not w_NK.numel():
        return
    at = (w_NK.float().view(rows, -1, group) - offset_NG[..., None]) * inverse_NG[..., None] + 127.5
    words = at.clamp(0, 255).round().to(torch.uint8).view(rows, columns).view(torch.int32)  # four neighbours each
    for plane, (one, bits) in enumerate(zip(out, PLANE_BITS, strict=True)):
        _write(one, _words_to_tiles(_plane_words(words, plane), group, bits))


def upper_halves(codes: Tensor, level: int, out: Tensor) -> None:
    """Codes of `level` bits to their upper halves.

    Args:
        codes: uint8 1-D, an even number of bytes.
        level: 16, 8 or 4.
        out: uint8 1-D, half as many bytes.

    Raises:
        LevelError: the level is another one.
        FoveateError: the codes have another form.
    """
    if level not in (16, 8, 4):
        raise LevelError(f"level (={level}) is not 16, 8 or 4")
    if codes.dtype != torch.uint8 or codes.dim() != 1 or codes.numel() % 2:
        raise FoveateError(f"codes (={codes.dtype} {list(codes.shape)}) are not an even number of bytes")
    _check_out(out, codes.numel() // 2)
    x = codes.contiguous().view(torch.int16).to(torch.int32)
    half = level // 2
    found = torch.zeros_like(x)
    for field in range(16 // level):
        found |= (x >> (level * field + half) & ((1 << half) - 1)) << half * field
    out.copy_(found)


def check_halves(w_NK: Tensor) -> None:
    """Raise `FoveateError` unless the weights have 16 bits."""
    if w_NK.dtype not in (torch.float16, torch.bfloat16):
        raise FoveateError(f"dtype (={w_NK.dtype}) is not float16 or bfloat16")


def check_tiles(rows: int, columns: int, group: int) -> None:
    """Raise `FoveateError` unless a matrix is made of whole tiles."""
    if rows % TILE_ROWS or columns % check_group(group):
        raise FoveateError(f"{rows} rows of {columns} inputs are not whole tiles of {TILE_ROWS} x {group}")


def _check_out(out: Tensor, size: int) -> None:
    if out.dtype != torch.uint8 or out.shape != (size,):
        raise FoveateError(f"out (={out.dtype} {list(out.shape)}) is not uint8 [{size}]")


def _write(out: Tensor, words: Tensor) -> None:
    out.copy_(words.contiguous().view(torch.uint8).flatten())


def _in_tile_order(words: Tensor, bits: int) -> Tensor:
    """Words whose fields are in the order of columns, with their fields in the order of a tile; int32."""
    fields = _WORD_BITS // bits
    for high, low in _SWAPS[bits]:
        shift = ((1 << high) - (1 << low)) * bits
        mask = 0
        for field in range(fields):
            if field >> low & 1 and not field >> high & 1:
                mask |= ((1 << bits) - 1) << bits * field
        moved = ((words >> shift) ^ words) & (mask - (1 << 32) if mask >> 31 else mask)
        words = words ^ moved ^ (moved << shift)
    return words


def _words_to_tiles(words: Tensor, group: int, bits: int) -> Tensor:
    """Words [N, K / fields] -> int32 [N / 16, G, chunks, 16]."""
    chunks = group * bits // _WORD_BITS
    return words.view(-1, TILE_ROWS, words.shape[1] // chunks, chunks).permute(0, 2, 3, 1)


def _plane_words(words: Tensor, plane: int) -> Tensor:
    """One plane of 8-bit codes: int32 words of four codes [N, K / 4] -> words of a tile's order [N, K * bits / 32]."""
    bits, shift = PLANE_BITS[plane], _SHIFTS[plane]
    mask, of_chunk = (0x03030303, 4) if bits == 2 else (0x01010101, 8)
    fields = words.view(words.shape[0], -1, of_chunk)
    out = torch.zeros_like(fields[:, :, 0])
    for number in range(of_chunk):
        place = 2 * number if bits == 2 else 2 * (number % 4) + number // 4
        out |= (fields[:, :, number] >> shift & mask) << place
    return out
