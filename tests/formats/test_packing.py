"""The stored form by its bytes. The numbers in `test_golden_*` were worked out by hand from docs/format.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.levels import PLANE_BITS
from foveate.formats.packing import (
    GROUPS,
    check_group,
    matrix_to_tiles,
    pack_plane,
    pack_scales,
    split_planes,
    tile_bytes,
    tile_offsets_of,
    tiles_to_matrix,
    unpack_plane,
)
from foveate.planes import from_codes
from tiny import generator


@given(
    plane=st.integers(0, 4),
    group=st.sampled_from(GROUPS),
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_unpacking_undoes_packing(plane: int, group: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << PLANE_BITS[plane], (rows, columns), generator=generator(seed), dtype=torch.uint8)
    packed = pack_plane(codes, plane, group)
    strips, groups = -(-rows // 16), -(-columns // group)
    assert packed.shape == (strips * groups, tile_bytes(plane, group))
    tiles = unpack_plane(packed, plane, group).view(strips, groups, 16, group)
    assert torch.equal(tiles_to_matrix(tiles, rows, columns), codes)
    # padding is code zero
    assert int(tiles.sum()) == int(codes.sum())


def _place(plane: int, group: int, groups: int, row: int, column: int) -> tuple[int, int]:
    """(byte, lowest bit) of a weight in a plane, read off docs/format.md."""
    tile = (row // 16) * groups + column // group
    r, k = row % 16, column % group
    if PLANE_BITS[plane] == 2:
        chunk, j, i = k // 16, k % 16 // 4, k % 4
        return tile * (group // 16) * 64 + chunk * 64 + 4 * r + i, 2 * j
    chunk, odd, j, i = k // 32, k % 32 // 16, k % 16 // 4, k % 4
    return tile * (group // 32) * 64 + chunk * 64 + 4 * r + i, 2 * j + odd


@pytest.mark.parametrize("plane", range(5))
@pytest.mark.parametrize("group", GROUPS)
def test_every_weight_lies_where_the_format_says(plane: int, group: int) -> None:
    rows, columns = 19, group + 37
    codes = torch.randint(0, 1 << PLANE_BITS[plane], (rows, columns), generator=generator(plane), dtype=torch.uint8)
    packed = pack_plane(codes, plane, group).flatten().tolist()
    groups = -(-columns // group)
    mask = (1 << PLANE_BITS[plane]) - 1
    for row in range(rows):
        for column in range(columns):
            byte, bit = _place(plane, group, groups, row, column)
            assert packed[byte] >> bit & mask == int(codes[row, column])


def _sparse(size: int, entries: dict[int, int]) -> Tensor:
    expected = torch.zeros(size, dtype=torch.uint8)
    for at, value in entries.items():
        expected[at] = value
    return expected


def test_golden_bytes() -> None:
    """18 x 64 in one group of 64: two tiles of 256 (2-bit planes) or 128 (1-bit planes) bytes."""
    anchor = torch.zeros(18, 64, dtype=torch.uint8)
    residual = torch.zeros(18, 64, dtype=torch.uint8)
    anchor[0, 0], residual[0, 0] = 0b1101, 0b1001
    anchor[3, 23], residual[3, 23] = 0b0110, 0b1110
    anchor[17, 63], residual[17, 63] = 0b1111, 0b0111
    scale, offset = torch.zeros(2, 18, 1)
    scale[0], offset[0] = 0.5, -1.5
    scale[17], offset[17] = 2.0, 0.25
    w = from_codes(anchor, residual, scale, offset, torch.ones(2, 1, dtype=torch.float16), group=64, reach=0)

    # (0, 0): byte 0, lowest bits.  (3, 23): chunk 1, byte 4*3+3, bits 2-3; one-bit chunk 0, bit 3.
    # (17, 63): tile 1, row 1: chunk 3, byte 4*1+3, bits 6-7; one-bit chunk 1, bit 7.
    assert torch.equal(w.planes[0], _sparse(512, {0: 0x03, 79: 0x04, 256 + 199: 0xC0}))
    assert torch.equal(w.planes[1], _sparse(256, {15: 0x08, 128 + 71: 0x80}))
    assert torch.equal(w.planes[2], _sparse(256, {0: 0x01, 128 + 71: 0x80}))
    assert torch.equal(w.planes[3], _sparse(512, {0: 0x02, 79: 0x0C, 256 + 199: 0x40}))
    assert torch.equal(w.planes[4], _sparse(512, {0: 0x01, 79: 0x08, 256 + 199: 0xC0}))
    # 2.0 is above 1.9375, so the exponent is 1, and 2.0 = 2^(15-15+1): 0xF0; 0.5 = 2^(13-15+1): 0xD0.
    # -1.5 is -24 eighths of 0.5: 0xE8; 0.25 is one eighth of 2.0. A tile is 16 scales, then 16 offsets.
    assert w.exponent == 1
    expected = [0] * 64
    expected[0], expected[16] = 0xD0, 0xE8
    expected[32 + 1], expected[32 + 17] = 0xF0, 0x01
    assert w.scales.tolist() == expected
    assert w.tile_offsets.tolist() == [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("level", "first", "last"),
    [
        # anchor 13, residual 9, s 0.5, m -1.5; anchor 15, residual 7, s 2, m 0.25
        (2, -1.5 + 0.5 * 4 * (3 - 1.5), 0.25 + 2 * 4 * (3 - 1.5)),
        (3, -1.5 + 0.5 * 2 * (6 - 3.5), 0.25 + 2 * 2 * (7 - 3.5)),
        (4, -1.5 + 0.5 * (13 - 7.5), 0.25 + 2 * (15 - 7.5)),
        (6, -1.5 + 0.5 * 0.25 * (13 * 4 + 2 - 31.5), 0.25 + 2 * 0.25 * (15 * 4 + 1 - 31.5)),
        (8, -1.5 + 0.5 * 0.0625 * (13 * 16 + 9 - 127.5), 0.25 + 2 * 0.0625 * (15 * 16 + 7 - 127.5)),
    ],
)
def test_golden_values(level: int, first: float, last: float) -> None:
    anchor, residual = torch.zeros(2, 18, 64, dtype=torch.uint8)
    anchor[0, 0], residual[0, 0] = 13, 9
    anchor[17, 63], residual[17, 63] = 15, 7
    scale, offset = torch.zeros(2, 18, 1)
    scale[0], offset[0], scale[17], offset[17] = 0.5, -1.5, 2.0, 0.25
    w = from_codes(anchor, residual, scale, offset, torch.ones(2, 1, dtype=torch.float16), group=64, reach=0)
    w.active_levels.fill_(level)
    dense = w.dequantize()
    assert float(dense[0, 0]) == first
    assert float(dense[17, 63]) == last


def test_split_planes_by_hand() -> None:
    planes = split_planes(torch.tensor([[0b1011]], dtype=torch.uint8), torch.tensor([[0b0110]], dtype=torch.uint8))
    assert [int(p) for p in planes] == [0b10, 1, 1, 0b01, 0b10]


@given(rows=st.integers(1, 40), columns=st.integers(1, 140), group=st.sampled_from(GROUPS))
def test_tiles_of_a_matrix(rows: int, columns: int, group: int) -> None:
    x = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + 1
    tiles = matrix_to_tiles(x, group)
    row, column = rows - 1, columns - 1
    assert tiles[row // 16, column // group, row % 16, column % group] == x[row, column]
    assert int((tiles != 0).sum()) == rows * columns
    assert torch.equal(tiles_to_matrix(tiles, rows, columns), x)


def test_scales_of_ragged_rows() -> None:
    scale = torch.arange(1, 19, dtype=torch.uint8).view(18, 1).repeat(1, 2)
    packed = pack_scales(scale, -scale.to(torch.int8))
    assert packed.shape == (4, 32)
    assert packed[2].tolist() == [17, 18, *[0] * 14, 256 - 17, 256 - 18, *[0] * 14]


def test_starts_count_only_what_is_stored() -> None:
    stored_levels = torch.tensor([[0, 2, 8], [4, 0, 0], [3, 6, 8]], dtype=torch.uint8)
    # scales, then planes 0-4, which exist from levels 2, 3, 4, 6, 8 on
    assert tile_offsets_of(stored_levels).tolist() == [[0, 0, 0, 0, 0, 0], [2, 2, 1, 1, 1, 1], [3, 3, 2, 2, 1, 1]]


@pytest.mark.parametrize("group", [0, 16, 100, 256])
def test_group_sizes(group: int) -> None:
    with pytest.raises(FoveateError, match=rf"group \(={group}\) is not one of 32, 64, 128"):
        check_group(group)
