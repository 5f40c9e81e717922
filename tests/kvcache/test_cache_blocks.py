"""Packed blocks: written once, read back within half a step, whatever the heads' levels and however they are cut."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import foveate as fv
from foveate.formats.levels import CACHE_LEVELS
from foveate.kvcache.blocks import Blocks, PackedHeads, is_exact
from tiny import generator

BLOCK = 32


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def all_of(blocks: Blocks) -> Tensor:
    return blocks.read(0, len(blocks)).flatten(2, 3)


def filled(packed: PackedHeads, like: Tensor, kept: list[int]) -> Tensor:
    out = torch.full_like(like[:, :, : sum(kept)], float("nan"))
    packed.fill(out, kept)
    return out


@pytest.mark.parametrize("level", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_read_is_within_half_a_step_of_its_channel(level: int, dtype: torch.dtype) -> None:
    x = numbers(2, 3, 2 * BLOCK, 5, dtype=dtype)
    blocks = Blocks(level, BLOCK)
    blocks.append(x)
    read = all_of(blocks)
    assert read.dtype == (dtype if is_exact(level, dtype) or dtype != torch.float64 else torch.float32)
    groups, back = (t.double().unflatten(2, (2, BLOCK)) for t in (x, read))
    if is_exact(level, dtype):
        assert torch.equal(read, x)
        return
    spread = groups.amax(3) - groups.amin(3)
    # low and step are bfloat16, rounded outwards: each moves by at most one part in 128 of what it is
    outer = spread + groups.abs().amax(3) / 128
    step = outer * (1 + 1 / 128) / (2**level - 1)
    resolution = torch.finfo(read.dtype).eps * groups.abs().amax(3)
    assert bool(((back - groups).abs().amax(3) <= step / 2 + resolution).all())


@given(
    level=st.sampled_from(CACHE_LEVELS),
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_blocks_do_not_depend_on_how_many_come_at_a_time(level: int, cuts: list[int], seed: int) -> None:
    x = numbers(2, 2, BLOCK * sum(cuts), 4, seed=seed)
    at_once, by_parts = Blocks(level, BLOCK), Blocks(level, BLOCK)
    at_once.append(x)
    for part in x.split([BLOCK * n for n in cuts], dim=2):
        by_parts.append(part)
    assert len(at_once) == len(by_parts) == sum(cuts)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parts, by_parts.parts, strict=True))


@given(
    levels=st.lists(st.sampled_from(CACHE_LEVELS), min_size=5, max_size=5),
    kept=st.lists(st.sampled_from([BLOCK, BLOCK, BLOCK, 1, 17]), min_size=1, max_size=6),
)
def test_heads_are_read_at_their_own_levels_and_short_blocks_are_short(levels: list[int], kept: list[int]) -> None:
    x = numbers(2, 5, BLOCK * len(kept), 3)
    packed = PackedHeads(levels, BLOCK)
    packed.append(x)
    alone = []
    for head, level in enumerate(levels):
        blocks = Blocks(level, BLOCK)
        blocks.append(x[:, head : head + 1])
        parts = [blocks.read(i, i + 1)[:, :, 0, :tokens] for i, tokens in enumerate(kept)]
        alone.append(torch.cat(parts, 2))
    assert torch.equal(filled(packed, x, kept), torch.cat(alone, 1))


def test_many_blocks_are_unpacked_in_pieces() -> None:
    # more numbers than are unpacked at a time, and a short block between long ones
    x = numbers(1, 2, 64 * 64, 80)
    packed = PackedHeads(8, 64)
    packed.append(x)
    kept = [64] * 64
    whole = filled(packed, x, kept)
    assert float((whole - x).abs().max()) < 0.05
    kept[10] = 7
    short = filled(packed, x, kept)
    assert torch.equal(short, torch.cat([whole[:, :, : 10 * 64 + 7], whole[:, :, 11 * 64 :]], 2))


def test_a_block_that_has_no_range_is_kept_as_it_is() -> None:
    x = numbers(2, 2, 3 * BLOCK, 4)
    x[1, 0, BLOCK + 3, 2] = float("inf")
    x[0, 1, BLOCK + 5, 0] = float("nan")
    blocks = Blocks(4, BLOCK)
    blocks.append(x[:, :, :BLOCK])
    blocks.append(x[:, :, BLOCK:])
    read = all_of(blocks)
    assert torch.equal(read[:, :, BLOCK : 2 * BLOCK].nan_to_num(7.0), x[:, :, BLOCK : 2 * BLOCK].nan_to_num(7.0))
    assert bool(read[:, :, :BLOCK].isfinite().all())
    assert bool(read[:, :, 2 * BLOCK :].isfinite().all())
    blocks.select(torch.tensor([1, 1]))
    assert float(all_of(blocks)[0, 0, BLOCK + 3, 2]) == float("inf")
    assert float(all_of(blocks)[1, 0, BLOCK + 3, 2]) == float("inf")
    blocks.truncate(1)
    assert not blocks.unpackable
    blocks.append(x[:, :, :BLOCK])
    assert bool(all_of(blocks).isfinite().all())


@pytest.mark.parametrize("level", CACHE_LEVELS)
def test_sequences_are_selected_and_bytes_counted(level: int) -> None:
    x = numbers(3, 2, 2 * BLOCK, 4)
    blocks = Blocks(level, BLOCK)
    assert (len(blocks), blocks.nbytes) == (0, 0)
    blocks.append(x)
    each = x.numel() * 4 if level == 32 else x.numel() * level // 8 + x.numel() // BLOCK * 4
    assert blocks.nbytes == each
    before = all_of(blocks)
    other = copy.deepcopy(blocks)
    blocks.select(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(all_of(blocks), before[[2, 0, 0, 1]])
    assert torch.equal(all_of(other), before)
    blocks.truncate(1)
    assert torch.equal(all_of(blocks), before[[2, 0, 0, 1], :, :BLOCK])
    assert blocks.nbytes == each * 4 // 3 // 2
    blocks.truncate(0)
    assert (len(blocks), blocks.nbytes) == (0, 0)


def test_levels_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    with pytest.raises(fv.LevelError, match=r"cache level \(=3\) is not one of 2, 4, 8, 16, 32"):
        PackedHeads((4, 3), BLOCK)
    with pytest.raises(fv.LevelError, match="levels for 2 heads, and the layer has 3"):
        PackedHeads((4, 2), BLOCK).append(numbers(1, 3, BLOCK, 4))
