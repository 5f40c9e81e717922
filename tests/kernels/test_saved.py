"""The ops on saved tensors: what their codes, ranges and variances promise, whatever backend runs them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends import table as dispatch
from foveate.kernels.saved.reference import FLOATS, GROUP_BITS, INTEGERS, NARROW_BITS, PAGE, uniform
from kernels.saved_cases import GROUPS, SEEDS, SIZES, mixed, same
from tiny import generator

dispatch.ensure_loaded()
ops = torch.ops.foveate


def back(x: Tensor, bits: int, group: int, seed: int | None = None) -> Tensor:
    codes, ranges = ops.group_pack(x, bits, group, seed)
    return ops.group_unpack(codes, ranges, bits, group, x.numel(), x.dtype)


@given(
    n=SIZES,
    group=GROUPS,
    bits=st.sampled_from(GROUP_BITS),
    dtype=st.sampled_from(FLOATS),
    seed=SEEDS,
    data=st.integers(0, 10**6),
)
def test_ranges_cover_and_errors_are_within_a_step(
    n: int, group: int, bits: int, dtype: torch.dtype, seed: int | None, data: int
) -> None:
    x = mixed(n, data, dtype, tame=True)
    codes, ranges = ops.group_pack(x, bits, group, seed)
    low, step = (t.repeat_interleave(group)[:n] for t in ranges.float().unbind(1))
    wide = x.float()
    most = 2**bits - 1
    assert codes.numel() == -(-n // group) * group * bits // 8
    assert bool((low <= wide).all())
    assert bool((low + most * step >= wide).all())
    # two bfloat16, rounded outwards: each at most a part in 2^7 more than needed
    for i, part in enumerate(wide.split(group) if n else ()):
        needed = float(part.max() - part.min()) + 2.0**-7 * float(part.min().abs())
        assert most * float(ranges[i, 1]) <= needed * (1 + 2.0**-6) + most * 2.0**-108
    y = ops.group_unpack(codes, ranges, bits, group, n, torch.float32)
    # fixed point has 8 bits of fraction, and 24 bits in all
    slack = step * (1 + 2.0 ** (bits - 16)) / 512 + (wide.abs() + low.abs()) * 2.0**-23
    assert bool(((y - wide).abs() <= step * (0.5 if seed is None else 1.0) + slack).all())


@pytest.mark.parametrize("bits", GROUP_BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_on_a_grid_come_back_exactly(bits: int, dtype: torch.dtype) -> None:
    most = min(2**bits - 1, 255)
    x = torch.randint(0, most + 1, (640,), generator=generator(bits)).float()
    x[::64], x[1::64] = 0, 2**bits - 1 if bits < 16 else 255
    x = ((x - 2) * 0.5).to(dtype)
    assert bits == 16 or torch.equal(back(x, bits, 64, 3), x)
    constant = torch.full((100,), 1.5, dtype=dtype)
    assert torch.equal(back(constant, bits, 32, 3), constant)


@pytest.mark.parametrize("bits", GROUP_BITS)
def test_stochastic_rounding_is_unbiased_and_has_the_variance_it_says(bits: int) -> None:
    seeds = 600
    x = mixed(1000, 3, tame=True)
    group = 96
    low, step = (t.repeat_interleave(group)[:1000] for t in ops.group_pack(x, bits, group, 0)[1].double().unbind(1))
    drawn = torch.stack([back(x, bits, group, seed) for seed in range(seeds)]).double()
    assert bool((drawn - x).abs().amax(0).le(step * 1.01 + x.abs() * 2.0**-22).all())
    # the mean: within 5 standard errors (of at most half a step each), and half a unit of fixed point
    error = (drawn.mean(0) - x).abs()
    rounding = step / 512 + (x.abs() + low.abs()) * 2.0**-22 + step * 2.0 ** (bits - 17)
    assert bool((error <= 5 * 0.5 * step / math.sqrt(seeds) + rounding).all())
    # the variance of a group: sampling, and what float32 does to values whose step is near its own

    def total(each: Tensor) -> Tensor:
        return torch.nn.functional.pad(each, (0, -1000 % group)).view(-1, group).sum(1)

    said = ops.group_variance(x, [bits], group)[0].double()
    seen = total(drawn.var(0))
    ulp = (x.double().abs() + low.abs()) * 2.0**-23
    sampling = 5 * math.sqrt(2 / seeds) * total(step**4 / 16).sqrt()
    assert bool(((said - seen).abs() <= sampling + total(ulp**2 + ulp * step)).all())
    assert float((said - seen).sum().abs() / said.sum()) < 0.02


def test_rounding_to_nearest_has_less_error_and_no_seed_touches_the_global_generator() -> None:
    x = torch.randn(4096, generator=generator(0))
    before = torch.get_rng_state()
    stochastic = (back(x, 4, 64, 1) - x).square().sum()
    nearest = (back(x, 4, 64) - x).square().sum()
    assert torch.equal(torch.get_rng_state(), before)
    assert 1.7 < float(stochastic / nearest) < 2.3
    assert torch.equal(back(x, 4, 64, 1), back(x, 4, 64, 1))
    assert not torch.equal(back(x, 4, 64, 1), back(x, 4, 64, 2))


def test_an_element_has_its_own_random_number_whatever_the_group() -> None:
    """Groups that share a range have the same codes, wherever groups begin."""
    x = torch.rand(960, generator=generator(1))
    x[::32], x[1::32] = 0, 1
    packed = [ops.group_pack(x, 8, group, 11)[0] for group in (32, 96, 320)]
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])


def test_the_generator_is_uniform_and_its_numbers_do_not_know_one_another() -> None:
    n = 1 << 20
    streams = [uniform(seed, n).double() for seed in (0, 1, -1, 2**63 - 1)]
    for u in streams:
        counts = torch.bincount(u.long(), minlength=256).double()
        chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)
        centred = (u - 127.5) / math.sqrt((256**2 - 1) / 12)
        for lag in (*range(1, 40), 64, 128, 256, 1024, 4096, 1 << 19):
            assert abs(float((centred[lag:] * centred[:-lag]).sum())) < 6 * math.sqrt(n)
        # sums over 256 neighbours have the variance of independent numbers
        sums = centred.view(-1, 256).sum(1)
        assert abs(float(sums.var()) / 256 - 1) < 6 * math.sqrt(2 / 4096)
        pairs = torch.bincount((u[::2] * 256 + u[1::2]).long(), minlength=65536).double()
        chi_square = float(((pairs - n / 131072) ** 2 / (n / 131072)).sum())
        assert abs(chi_square - 65535) < 6 * math.sqrt(2 * 65535)
    for i, u in enumerate(streams):
        for v in streams[:i]:
            assert abs(float(((u - 127.5) * (v - 127.5)).mean())) < 6 * 256**2 / 12 / math.sqrt(n)
    assert uniform(5, 3 * PAGE)[PAGE : PAGE + 64].tolist() != uniform(5, 64).tolist()


@pytest.mark.parametrize("bits", GROUP_BITS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_says_so_and_harms_no_other(bits: int, dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(200, generator=generator(4)).to(dtype)
    clean = back(x, bits, 64, 9)
    for place in (0, 100, 127, 199):
        y = x.clone()
        y[place] = bad
        codes, ranges = ops.group_pack(y, bits, 64, 9)
        mine = torch.arange(200) // 64 == place // 64
        assert torch.equal(ranges[:, 0].isnan(), torch.arange(4) == place // 64)
        got = ops.group_unpack(codes, ranges, bits, 64, 200, dtype)
        assert bool(got[mine].isnan().all())
        assert torch.equal(got[~mine], clean[~mine])
        assert torch.equal(ops.group_variance(y, [bits], 64)[0].isnan(), torch.arange(4) == place // 64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_decodes_is_finite_or_the_range_says_no(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    half = torch.tensor([-0.4 * limit, 0.4 * limit] * 16).to(dtype)
    assert bool(back(half, 2, 32).isfinite().all())
    for least, most in ((-limit, limit), (0.0, limit), (-limit, 0.0)):
        x = torch.tensor([least, most] * 16, dtype=dtype)
        codes, ranges = ops.group_pack(x, 2, 32)
        got = ops.group_unpack(codes, ranges, 2, 32, 32, dtype)
        assert bool(got.isfinite().all()) != bool(ranges[0, 0].isnan())
    tiny = torch.tensor([1e-45, -1e-45, 0.0, -0.0] * 8)
    assert float(back(tiny, 8, 32, 1).abs().max()) <= 2.0**-107


def test_bytes_of_codes_and_ranges_are_as_the_format_has_them() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(8)
    for bits, codes, step in (
        (2, [0xE4] * 8, 0x3F80),
        (4, [0x50, 0xFA] * 8, 0x3E4D),
        (8, [0, 85, 170, 255] * 8, 0x3C41),
    ):
        got, ranges = ops.group_pack(x, bits, 32)
        assert got.tolist() == codes
        assert ranges.view(torch.int16).tolist() == [[0, step]]
    x[0], x[31] = 65535.0, 513.0
    got, ranges = ops.group_pack(x, 16, 32)
    assert ranges.tolist() == [[0.0, 1.0]]
    assert got[:6].tolist() == [255, 255, 1, 0, 2, 0]
    assert got[-2:].tolist() == [1, 2]
    low = ops.group_pack(torch.full((3,), -0.1), 2, 32)[1]
    assert low.view(torch.int16)[0, 0].item() & 0xFFFF == 0xBDCD  # away from zero, for it is rounded down
    assert uniform(42, 12).tolist() == GOLDEN_42
    assert ops.mask_pack(torch.tensor([1.0, -1, 0, 2, 0, 0, 0, 3, 1]), 0.0).tolist() == [0x89, 1]
    assert ops.narrow_pack(torch.tensor([5, 6, 8, 7, 5]), 2, 5).tolist() == [0xB4, 0]
    assert ops.narrow_pack(torch.tensor([-1, 300]), 16, -1).tolist() == [0, 0, 45, 1]


GOLDEN_42 = [44, 17, 1, 178, 117, 2, 16, 114, 55, 61, 67, 9]


def test_any_order_of_dimensions_is_read_as_it_lies_in_memory() -> None:
    x = torch.randn(6, 10, 4, generator=generator(8))
    turned = x.permute(2, 0, 1)
    for a, b in zip(ops.group_pack(turned, 4, 32, 1), ops.group_pack(x, 4, 32, 1), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ops.mask_pack(turned, 0.1), ops.mask_pack(x, 0.1))
    part = torch.randn(50)[3:40]  # not aligned to anything
    assert same(back(part, 8, 32, 1), back(part.clone(), 8, 32, 1))
    images = x.view(2, 3, 10, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.moments(images, 4)[1], ops.moments(images.contiguous(), 4)[1])
    for gaps in (x[:, ::2], x[:, :5], torch.randn(5, 1).expand(5, 3)):
        calls = (("group_pack", 2, 32), ("group_variance", [2], 32), ("mask_pack", 0.0), ("moments", 2))
        for name, *rest in (*calls, ("two_values_pack",)):
            with pytest.raises(RuntimeError, match="has gaps or overlaps in memory"):
                getattr(ops, name)(gaps, *rest)
        with pytest.raises(RuntimeError, match="has gaps or overlaps in memory"):
            ops.narrow_pack(gaps.view(torch.int32), 32, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64])
def test_two_values_by_their_bits(dtype: torch.dtype) -> None:
    pair = torch.tensor([0, 1]).to(dtype)
    x = pair[torch.randint(0, 2, (1000,), generator=generator(2))]
    bits, values = ops.two_values_pack(x)
    assert bits.numel() == 125
    assert torch.equal(values, x[:1].repeat(2).where(torch.tensor([True, False]), pair[~(pair == x[0])]))
    assert torch.equal(ops.mask_unpack(bits, values, 1000), x)
    constant = pair[1:].expand(77).clone()
    bits, values = ops.two_values_pack(constant)
    assert torch.equal(ops.mask_unpack(bits, values, 77), constant)
    if dtype != torch.bool:
        x[999] = 2
        assert all(t.numel() == 0 for t in ops.two_values_pack(x))
    assert all(t.numel() == 0 for t in ops.two_values_pack(x[:0]))


def test_nan_and_minus_zero_are_values_of_their_own() -> None:
    x = torch.tensor([math.nan, -0.0, math.nan, -0.0])
    bits, values = ops.two_values_pack(x)
    assert bits.tolist() == [0b1010]
    assert torch.equal(ops.mask_unpack(bits, values, 4).view(torch.int32), x.view(torch.int32))
    assert ops.two_values_pack(torch.tensor([0.0, -0.0, 1.0]))[0].numel() == 0


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_come_back(dtype: torch.dtype) -> None:
    for bits in NARROW_BITS:
        low = 0 if dtype == torch.bool else 3
        most = min(2**bits - 1, 1 if dtype == torch.bool else torch.iinfo(dtype).max - low)
        x = (torch.randint(0, most + 1, (77,), generator=generator(bits)) + low).to(dtype)
        codes = ops.narrow_pack(x, bits, low)
        assert codes.numel() == -(-77 * bits // 8)
        assert same(ops.narrow_unpack(codes, bits, low, 77, dtype), x)
    for wrong in (torch.tensor([4, 1]), torch.tensor([0, 3]), torch.tensor([2**40, 1])):
        with pytest.raises(RuntimeError, match=r"x has values outside 1..2, the integers that 1 bits hold from low"):
            ops.narrow_pack(wrong, 1, 1)


def test_moments_of_known_values() -> None:
    x = torch.tensor([0.0, 1, 2, 3, math.nan, math.inf, -0.0, 4])
    found, histogram = ops.moments(x, 4)
    assert found.tolist() == [6, 10 / 6, pytest.approx(30 - 100 / 6), 0, 4, 2, 2]
    assert histogram.tolist() == [2, 1, 1, 2]
    found, histogram = ops.moments(torch.tensor([math.nan]), 3)
    assert found[[0, 2, 5, 6]].tolist() == [0, 0, 0, 1]
    assert bool(found[[1, 3, 4]].isnan().all())
    assert histogram.tolist() == [0, 0, 0]
    assert ops.moments(torch.full((5,), 7.0), 3)[1].tolist() == [5, 0, 0]


CODES, RANGES = torch.zeros(96, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.bfloat16)
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("group_pack", (torch.ones(4), 3, 32, None), r"bits \(=3\) is not one of 2, 4, 8, 16"),
    ("group_pack", (torch.ones(4), 2, 48, None), r"group \(=48\) is not a multiple of 32 from 32 to 1024"),
    ("group_pack", (torch.ones(4), 2, 2048, None), r"group \(=2048\) is not a multiple"),
    ("group_pack", (torch.ones(4).double(), 2, 32, None), r"x has dtype \(=.*\), not float32, bfloat16 or float16"),
    ("group_variance", (torch.ones(4), [2, 5], 32), r"bits \(=5\) is not one of"),
    ("group_unpack", (CODES, RANGES, 8, 32, 97, torch.float32), r"are not those of n \(=97\) elements in groups of 32"),
    ("group_unpack", (CODES, RANGES, 8, 32, 64, torch.float32), r"uint8 \[64\] and bfloat16 \[2, 2\]"),
    ("group_unpack", (CODES, RANGES.float(), 8, 32, 96, torch.float32), "are not those of n"),
    ("group_unpack", (CODES, RANGES, 8, 32, 96, torch.float64), r"dtype \(=.*\) is not float32, bfloat16 or float16"),
    ("mask_pack", (torch.ones(4).long(), 0.0), r"x has dtype \(=.*\), not a float or bool"),
    ("two_values_pack", (torch.ones(4, dtype=torch.complex128),), "whose elements are not 1, 2, 4 or 8 bytes"),
    ("mask_unpack", (CODES, torch.ones(3), 768), r"values \[3\] is not \[2\]"),
    ("mask_unpack", (CODES, torch.ones(2), 769), r"is not uint8 \[97\], one bit for each of n \(=769\) elements"),
    ("narrow_pack", (torch.ones(4).long(), 3, 0), r"bits \(=3\) is not one of 1, 2, 4, 8, 16, 32"),
    ("narrow_pack", (torch.ones(4), 4, 0), r"x has dtype \(=.*\), not an integer or bool"),
    ("narrow_unpack", (CODES, 4, 0, 190, torch.int64), r"is not uint8 \[95\], 4 bits for each of n \(=190\) elements"),
    ("narrow_unpack", (CODES, 4, 0, 192, torch.half), r"dtype \(=.*\).* not an integer or bool"),
    ("moments", (torch.ones(4), 0), r"bins \(=0\) is not at least 1"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD)
def test_bad_arguments_are_named(name: str, args: tuple[Any, ...], message: str) -> None:
    import foveate.kernels.saved.reference as reference

    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*args)
    with pytest.raises(RuntimeError, match=message):
        getattr(reference, name)(*args)


OPCHECKS: list[tuple[str, tuple[Any, ...]]] = [
    ("group_pack", (torch.randn(70, 10), 2, 32, 5)),
    ("group_pack", (torch.randn(70, 10, requires_grad=True), 8, 64, None)),
    ("group_unpack", (torch.zeros(96 * 4, dtype=torch.uint8), torch.ones(3, 2).bfloat16(), 8, 128, 300, torch.half)),
    ("group_variance", (torch.randn(333), [2, 8, 16], 96)),
    ("mask_pack", (torch.randn(3, 70), 0.5)),
    ("two_values_pack", (torch.randn(3, 70) > 0,)),
    ("mask_unpack", (torch.zeros(5, dtype=torch.uint8), torch.tensor([1.0, 2.0]), 33)),
    ("narrow_pack", (torch.arange(9, 25), 4, 9)),
    ("narrow_unpack", (torch.zeros(5, dtype=torch.uint8), 4, -1, 9, torch.int64)),
    ("moments", (torch.randn(3, 70), 16)),
]


@pytest.mark.parametrize(("name", "args"), OPCHECKS)
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, args)


def test_nothing_that_comes_out_requires_a_gradient() -> None:
    x = torch.randn(64, requires_grad=True)
    two = (x > 0).float().requires_grad_()
    codes, ranges = ops.group_pack(x, 4, 32, 1)
    bits, values = ops.two_values_pack(two)
    found = [
        codes, ranges, bits, values, ops.group_variance(x, [4], 32), ops.mask_pack(x, 0.0), *ops.moments(x, 3),
        ops.group_unpack(codes, ranges.detach().requires_grad_(), 4, 32, 64, torch.float32),
        ops.mask_unpack(bits, values.detach().requires_grad_(), 64),
    ]  # fmt: skip
    assert not any(t.requires_grad for t in found)


def test_compiled_graphs_take_the_ops_with_any_size() -> None:
    def through(x: Tensor) -> Tensor:
        codes, ranges = ops.group_pack(x, 8, 32, 1)
        return ops.group_unpack(codes, ranges, 8, 32, x.numel(), x.dtype).view(x.shape)

    compiled = torch.compile(through, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (40, 41, 96):
        x = torch.randn(n, 3, generator=generator(n))
        assert torch.equal(compiled(x), through(x))
    torch._dynamo.reset()
