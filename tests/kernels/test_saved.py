"""The ops on saved tensors: what their codes, ranges and variances promise, whatever backend runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels import dispatch
from foveate.kernels.saved_reference import FLOATS, GROUP_BITS, INTEGERS
from tiny import generator

dispatch.ensure_loaded()
ops = torch.ops.foveate
SIZES = st.sampled_from((0, 1, 31, 32, 33, 95, 96, 97, 1023, 1024, 1025)) | st.integers(0, 5000)
GROUPS = st.sampled_from((32, 64, 96, 128, 256, 1024))


def random(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Groups of every size and place, some of them constant."""
    g = generator(seed)
    x = torch.randn(n, generator=g) * 10 ** (4 * torch.rand(n // 64 + 1, generator=g) - 2).repeat_interleave(64)[:n]
    x = x + torch.randn(n // 64 + 1, generator=g).repeat_interleave(64)[:n]
    return torch.where((torch.arange(n) // 64 % 7 == 3), 0.3, x).to(dtype)


def back(x: Tensor, bits: int, group: int, seed: int | None) -> Tensor:
    codes, ranges = ops.group_pack(x, bits, group, seed)
    return ops.group_unpack(codes, ranges, bits, group, x.numel(), torch.float32)


@given(
    n=SIZES,
    group=GROUPS,
    bits=st.sampled_from(GROUP_BITS),
    dtype=st.sampled_from(FLOATS),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    data=st.integers(0, 1000),
)
def test_ranges_cover_and_errors_are_within_a_step(
    n: int, group: int, bits: int, dtype: torch.dtype, seed: int | None, data: int
) -> None:
    x = random(n, data, dtype)
    codes, ranges = ops.group_pack(x, bits, group, seed)
    low, step = (t.repeat_interleave(group)[:n] for t in ranges.float().unbind(1))
    wide = x.float()
    assert codes.numel() == -(-n // group) * group * bits // 8
    assert bool((low <= wide).all())
    assert bool((low + (2**bits - 1) * step >= wide).all())
    y = ops.group_unpack(codes, ranges, bits, group, n, torch.float32)
    # the arithmetic rounds in float32: a part in 2^22 of what was subtracted, and of the step's multiples
    slack = (wide.abs() + low.abs() + (2**bits - 1) * step) * 2.0**-22
    assert bool(((y - wide).abs() <= step * (0.5 if seed is None else 1.0) + slack).all())
    if bits >= 4 and seed is None and n > 64:
        assert float((y - wide).square().sum()) < float((wide - wide.mean()).square().sum())


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


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_come_back(dtype: torch.dtype) -> None:
    for bits, n in ((1, 13), (2, 7), (4, 9), (8, 5), (16, 6), (32, 4)):
        low = 0 if dtype == torch.bool else 3
        most = min(2**bits - 1, 1 if dtype == torch.bool else torch.iinfo(dtype).max - low)
        x = (torch.randint(0, most + 1, (n,), generator=generator(bits)) + low).to(dtype)
        codes = ops.narrow_pack(x, bits, low)
        assert codes.numel() == -(-n * bits // 8)
        got = ops.narrow_unpack(codes, bits, low, n, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, x)
