"""What changes its form while it moves is what the formats say, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import FoveateError, LevelError
from foveate.formats.levels import PLANE_BITS
from foveate.formats.packing import pack_plane
from foveate.kernels.backends.table import ensure_loaded
from foveate.memory import convert
from foveate.planes import from_codes
from tiny import generator


def _rows(codes_NK: Tensor, bits: int) -> Tensor:
    """The codes of a row one after another, the first in the lowest bits."""
    parts = codes_NK.view(codes_NK.shape[0], -1, 8 // bits)
    shifts = torch.arange(0, 8, bits)
    return (parts.int() << shifts).sum(2).to(torch.uint8)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("plane", range(5))
def test_tile_order_is_that_of_the_planes(plane: int, group: int) -> None:
    ensure_loaded()
    codes = torch.randint(0, 1 << PLANE_BITS[plane], (80, 3 * group), generator=generator(plane), dtype=torch.uint8)
    found = convert.tile_order(_rows(codes, PLANE_BITS[plane]), plane, group)
    assert torch.equal(found, pack_plane(codes, plane, group).flatten())
    with pytest.raises(FoveateError, match="are not whole tiles"):
        convert.tile_order(_rows(codes, PLANE_BITS[plane])[:-1], plane, group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 128])
def test_weights_of_16_bits_become_planes(group: int, dtype: torch.dtype) -> None:
    ensure_loaded()
    w = (torch.randn(64, 2 * group, generator=generator(0)) * 0.05).to(dtype)
    made = convert.halves_to_planes(w, group)
    empty = torch.zeros(64, 2 * group, dtype=torch.uint8)
    like = from_codes(
        empty, empty, torch.ones(64, 2), torch.zeros(64, 2), torch.ones(2, 1).half(), group=group, reach=0
    )
    for found, plane in zip(made.planes, like.planes, strict=True):
        assert found.shape == plane.shape
        plane.copy_(found)
    like.scales.copy_(made.scales)
    object.__setattr__(like, "geometry", (*like.geometry[:4], made.exponent))
    low, high = w.float().view(64, 2, group).aminmax(dim=2)
    for level, codes in ((8, 256), (4, 16), (2, 4)):
        like.active_levels.fill_(level)
        error = (like.dequantize() - w.float()).view(64, 2, group).abs().amax(2)
        # half a step of the level, widened by what a byte rounds off scale (1/32) and offset (1/16 of a scale)
        step = (high - low) / (codes - 1)
        slack = (high - low) / 15 * (1 / 16 + 1 / 2) + (high - low) / 32
        assert bool((error <= step / 2 * 1.07 + slack).all()), level
    with pytest.raises(FoveateError, match="is not float16 or bfloat16"):
        convert.halves_to_planes(w.float(), group)
    w[5, 7] = float("inf")
    with pytest.raises(FoveateError, match="NaN or Inf"):
        convert.halves_to_planes(w, group)


@pytest.mark.parametrize(("level", "target"), [(16, 8), (16, 4), (8, 4), (8, 2), (4, 2)])
def test_cache_entries_at_fewer_bits(level: int, target: int) -> None:
    ensure_loaded()
    group = 64
    x = torch.randn(10 * group, generator=generator(1))
    codes, ranges = torch.ops.foveate.group_pack(x, level, group, None)
    fewer, their_ranges = convert.fewer_bits(codes, ranges, level, target)
    assert fewer.numel() == codes.numel() * target // level

    def unpacked(some: Tensor, at: Tensor, bits: int) -> Tensor:
        y: Tensor = torch.ops.foveate.group_unpack(some, at, bits, group, x.numel(), torch.float32)
        return y

    before, after = unpacked(codes, ranges, level), unpacked(fewer, their_ranges, target)
    step = their_ranges[:, 1].float().repeat_interleave(group)
    rounding = their_ranges[:, 0].float().abs().repeat_interleave(group) * 2**-8 + step * 15 * 2**-8
    assert bool(((after - before).abs() <= step / 2 + rounding).all())
    # and each code is the upper half of what it was
    assert float((after - x).abs().mean()) < 0.3 * float(step.mean()) + float(rounding.mean())


def test_levels_that_do_not_shrink_are_refused() -> None:
    with pytest.raises(LevelError, match="with target below level"):
        convert.fewer_bits(torch.zeros(8, dtype=torch.uint8), torch.zeros(1, 2).bfloat16(), 4, 8)
