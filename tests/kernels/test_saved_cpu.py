"""The compiled kernels on saved tensors give the bits of the reference, with every instruction set and any threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.saved import reference as reference
from foveate.kernels.saved.reference import FLOATS, GROUP_BITS, INTEGERS, NARROW_BITS
from kernels.cases import forced, isas
from kernels.saved_cases import GROUPS, SEEDS, SIZES, WORDS, float_data, same
from tiny import generator

ISAS = isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")
ops = torch.ops.foveate


@settings(max_examples=150)
@given(x=float_data(), group=GROUPS, bits=st.sampled_from(GROUP_BITS), seed=SEEDS, out=st.sampled_from(FLOATS))
def test_groups(x: Tensor, group: int, bits: int, seed: int | None, out: torch.dtype) -> None:
    codes, ranges = reference.group_pack(x, bits, group, seed)
    back = reference.group_unpack(codes, ranges, bits, group, x.numel(), out)
    levels = [bits, 2, 16]
    variance = reference.group_variance(x, levels, group)
    for isa in ISAS:
        with forced(isa):
            got_codes, got_ranges = ops.group_pack(x, bits, group, seed)
            assert same(got_ranges, ranges), isa
            assert same(got_codes, codes), isa
            assert same(ops.group_unpack(codes, ranges, bits, group, x.numel(), out), back), isa
            assert same(ops.group_variance(x, levels, group), variance), isa


@pytest.mark.parametrize("bits", GROUP_BITS)
def test_neither_threads_nor_pages_nor_sizes_beyond_the_caches_change_a_bit(bits: int) -> None:
    """Three pages of 2^21 elements, groups of 96 across their borders."""
    x = torch.randn(2 * reference.PAGE + 12345, generator=generator(1))
    codes, ranges = reference.group_pack(x, bits, 96, 7)
    back = reference.group_unpack(codes, ranges, bits, 96, len(x), torch.float32)
    for isa in ISAS:
        with forced(isa):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert all(map(same, ops.group_pack(x, bits, 96, 7), (codes, ranges))), (isa, threads)
                assert same(ops.group_unpack(codes, ranges, bits, 96, len(x), torch.float32), back), (isa, threads)


@given(
    x=float_data(),
    threshold=st.sampled_from((0.0, -0.0, 0.1, 1.0, -1e30, math.inf, -math.inf, math.nan, 1e300)),
    dtype=st.sampled_from((*FLOATS, torch.float64, torch.bool)),
)
def test_masks(x: Tensor, threshold: float, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    bits = reference.mask_pack(x, threshold)
    for isa in ISAS:
        with forced(isa):
            assert same(ops.mask_pack(x, threshold), bits), isa


@given(
    n=SIZES, dtype=st.sampled_from(WORDS), share=st.sampled_from((0.0, 0.1, 0.5, 1.0)), third=st.booleans(), seed=SEEDS
)
def test_two_values(n: int, dtype: torch.dtype, share: float, third: bool, seed: int | None) -> None:
    g = generator(seed or 0)
    values = torch.randint(0, 256, (3, dtype.itemsize), dtype=torch.uint8, generator=g).view(dtype).view(-1)
    if dtype == torch.bool:
        values = torch.tensor([True, False, True])
    which = (torch.rand(n, generator=g) < share).long()
    if third and n:
        which[int(torch.randint(0, n, (), generator=g))] = 2
    x = values[which]
    bits, two = reference.two_values_pack(x)
    for isa in ISAS:
        with forced(isa):
            got_bits, got_two = ops.two_values_pack(x)
            assert same(got_bits, bits), isa
            assert bytes_of(got_two) == bytes_of(two), isa
            if len(two):
                assert bytes_of(ops.mask_unpack(bits, two, n)) == bytes_of(x), isa


def bytes_of(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).tolist() if x.numel() else []


@given(n=SIZES, dtype=st.sampled_from(INTEGERS), bits=st.sampled_from(NARROW_BITS), seed=st.integers(0, 1000))
def test_narrow(n: int, dtype: torch.dtype, bits: int, seed: int) -> None:
    info = torch.iinfo(torch.uint8 if dtype == torch.bool else dtype)
    least, most = (0, 1) if dtype == torch.bool else (info.min, info.max)
    low = max(least, -5)
    top = min(most, low + 2**bits - 1)
    x = torch.randint(low, top + 1, (n,), generator=generator(seed)).to(dtype)
    codes = reference.narrow_pack(x, bits, low)
    for isa in ISAS:
        with forced(isa):
            assert same(ops.narrow_pack(x, bits, low), codes), isa
            assert same(ops.narrow_unpack(codes, bits, low, n, dtype), x), isa


@settings(max_examples=60)
@given(x=float_data(), bins=st.sampled_from((1, 2, 64, 1000)))
def test_moments(x: Tensor, bins: int) -> None:
    want, histogram = reference.moments(x, bins)
    first = None
    for isa in ISAS:
        with forced(isa):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got, got_histogram = ops.moments(x, bins)
                first = got if first is None else first
                assert same(got, first), (isa, threads)
                assert torch.equal(got_histogram, histogram), isa
    assert first is not None
    exact = [0, 3, 4, 5, 6]
    assert same(first[exact], want[exact])
    finite = x[x.isfinite()].double()
    if len(finite):
        # n additions in float64, in any order
        eps = len(finite) * torch.finfo(torch.float64).eps
        assert abs(float(first[1] - want[1])) <= 2 * eps * float(finite.abs().mean())
        assert abs(float(first[2] - want[2])) <= 8 * eps * float(finite.square().sum())
