"""Codes to planes and back: where each bit of a weight lies in memory.

A plane of a tile (16 rows by one group of inputs) is a run of 64-byte chunks. Each of the 16 rows has a 32-bit lane of
a chunk, so a kernel needs no horizontal sums, and four neighbouring inputs are one broadcast operand. A chunk of a
2-bit plane covers 16 columns, of a 1-bit plane 32; docs/format.md, "Tiles", has the bit positions.

Shapes: N rows, K inputs, g inputs in a group; NT = ceil(N / 16) strips, G = ceil(K / g) groups, T = NT * G tiles, B
bytes of one plane of one tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.levels import NESTED_LEVELS, PLANE_BITS

TILE_ROWS = 16
#: How many inputs a group may have.
GROUPS: tuple[int, ...] = (32, 64, 128)
#: Bytes of the scales and offsets of a tile.
SCALE_BYTES = 2 * TILE_ROWS
#: Bytes that say which tile an exact tile is.
EXACT_INDEX_BYTES = 4


def check_group(group: int) -> int:
    """Return `group` if it is a group size of the stored form, else raise `FoveateError`."""
    if group not in GROUPS:
        raise FoveateError(f"group (={group}) is not one of 32, 64, 128")
    return group


def tile_grid(rows: int, columns: int, group: int) -> tuple[int, int]:
    """(NT, G): strips of 16 rows and groups of inputs of a [rows, columns] weight."""
    return -(-rows // TILE_ROWS), -(-columns // group)


def tile_bytes(plane: int, group: int) -> int:
    """Bytes of one plane of one tile: 16 rows x `group` inputs x the plane's bits."""
    return TILE_ROWS * group * PLANE_BITS[plane] // 8


def split_planes(anchor_NK: Tensor, residual_NK: Tensor) -> list[Tensor]:
    """The five planes' codes (uint8 [N, K] each) of 4-bit anchor codes and 4-bit residual codes."""
    return [anchor_NK >> 2, (anchor_NK >> 1) & 1, anchor_NK & 1, residual_NK >> 2, residual_NK & 3]


def matrix_to_tiles(x_NK: Tensor, group: int) -> Tensor:
    """[N, K] values -> [NT, G, 16, group], padded with zeros to whole tiles."""
    rows, columns = x_NK.shape
    strips, groups = tile_grid(rows, columns, group)
    padded = F.pad(x_NK, (0, groups * group - columns, 0, strips * TILE_ROWS - rows))
    return padded.view(strips, TILE_ROWS, groups, group).transpose(1, 2)


def tiles_to_matrix(w_tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[NT, G, 16, group] values -> [rows, columns], without the padding."""
    strips, groups, tile_rows, group = w_tiles.shape
    return w_tiles.transpose(1, 2).reshape(strips * tile_rows, groups * group)[:rows, :columns]


def pack_plane(codes_NK: Tensor, plane: int, group: int) -> Tensor:
    """Pack one plane's codes.

    Args:
        codes_NK: uint8 [N, K], values below 2 ** PLANE_BITS[plane].
        plane: which plane, 0 the most significant.
        group: inputs in a group.

    Returns:
        uint8 [T, B], tiles in order nt * G + gi.
    """
    tiles = matrix_to_tiles(codes_NK, group)
    strips, groups = tiles.shape[:2]
    if PLANE_BITS[plane] == 2:
        # column = 16h + 4j + i  ->  chunk h, byte (row, i), bits 2j and 2j+1
        fields = tiles.reshape(strips, groups, TILE_ROWS, group // 16, 4, 4)
        packed = fields[..., 0, :] | fields[..., 1, :] << 2 | fields[..., 2, :] << 4 | fields[..., 3, :] << 6
    else:
        # column = 32h + 16o + 4j + i  ->  chunk h, byte (row, i), bit 2j + o
        fields = tiles.reshape(strips, groups, TILE_ROWS, group // 32, 2, 4, 4)
        packed = torch.zeros(strips, groups, TILE_ROWS, group // 32, 4, dtype=torch.uint8, device=codes_NK.device)
        for odd in range(2):
            for j in range(4):
                packed |= fields[..., odd, j, :] << (2 * j + odd)
    return packed.transpose(2, 3).reshape(strips * groups, -1)


def unpack_plane(packed_TB: Tensor, plane: int, group: int) -> Tensor:
    """The inverse of `pack_plane` for any run of tiles: uint8 [T, B] -> codes uint8 [T, 16, group]."""
    tiles = packed_TB.shape[0]
    if PLANE_BITS[plane] == 2:
        chunks = packed_TB.view(tiles, group // 16, TILE_ROWS, 4)
        codes = torch.stack([chunks >> (2 * j) & 3 for j in range(4)], dim=3)
    else:
        chunks = packed_TB.view(tiles, group // 32, TILE_ROWS, 4)
        codes = torch.stack([chunks >> (2 * j + odd) & 1 for odd in range(2) for j in range(4)], dim=3)
    return codes.transpose(1, 2).reshape(tiles, TILE_ROWS, group)


def pack_scales(scale_NG: Tensor, offset_NG: Tensor) -> Tensor:
    """Codes of scales (uint8) and offsets (int8) [N, G] -> uint8 [T, 32]: the scales of a tile's 16 rows, then their
    offsets.
    """
    rows, groups = scale_NG.shape
    strips = -(-rows // TILE_ROWS)
    both = torch.stack([scale_NG, offset_NG.view(torch.uint8)])
    both = F.pad(both, (0, 0, 0, strips * TILE_ROWS - rows))
    return both.view(2, strips, TILE_ROWS, groups).permute(1, 3, 0, 2).reshape(strips * groups, SCALE_BYTES)


def tile_offsets_of(stored_levels: Tensor) -> Tensor:
    """Where each strip's tiles begin in the scales and in each plane, counted in stored tiles.

    Args:
        stored_levels: uint8 [NT, G], the highest level stored for each tile.

    Returns:
        int64 [NT, 6]: column 0 for the scales, 1 + p for plane p.
    """
    least_levels = (1, *NESTED_LEVELS)  # the scales exist at any level above 0, plane p from NESTED_LEVELS[p] on
    counts = torch.stack([(stored_levels >= least).sum(1) for least in least_levels], dim=1)
    return (counts.cumsum(0) - counts).contiguous()
