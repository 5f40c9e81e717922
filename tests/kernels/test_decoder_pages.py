"""`decoder_blocks_paged`: sequences whose cached positions lie in pages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.decoder import reference
from kernels.cases import forced, isas
from kernels.decoder_cases import NUMBERS, Decoder, decoder, decoders, near
from tiny import generator

ISAS = isas()
ops = torch.ops.foveate
needs_compiler = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")


@needs_compiler
@settings(max_examples=20)
@given(
    decoders(),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 300)), min_size=1, max_size=4),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(0, 100),
)
def test_sequences_in_pages(d: Decoder, sizes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
    """`sizes` are the new and the cached positions of each sequence."""
    g = generator(seed)
    lengths = torch.tensor([new for new, _ in sizes])
    totals = torch.tensor([new + cached for new, cached in sizes])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), totals.cumsum(0)])
    reads = torch.randperm(int(totals.sum()) + 5, generator=g)[: int(totals.sum())]
    writes = torch.cat([reads[int(end - new) : int(end)] for end, new in zip(ends[1:], lengths, strict=True)])
    x = torch.randn(1, int(lengths.sum()), d.width, generator=g)
    positions = torch.cat([torch.arange(int(t - n), int(t)) for t, n in zip(totals, lengths, strict=True)])
    shape = (len(reads) + 5, d.numbers.kv_heads, d.numbers.head_size)
    caches = [torch.randn(shape, generator=g).to(dtype) for _ in range(2 * d.blocks)]

    def run(op: Any, handle: Tensor) -> list[Tensor]:
        own = [cache.clone() for cache in caches]
        keys, values = own[: d.blocks], own[d.blocks :]
        lists = ([one] * d.blocks for one in (ends, reads, writes))
        return [op(x, handle, d.book, keys, values, *d.angles(positions[None]), lengths, *lists), *own]

    expected = run(reference.decoder_blocks_paged, d.expected)
    for isa in ISAS:
        with forced(isa):
            got = run(ops.decoder_blocks_paged, d.handle)
            error = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            assert all(near(a, b, error) for a, b in zip(got, expected, strict=True)), isa


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "are not those of 3 rows"),
        ({"lengths": torch.tensor([1, 1])}, "lengths are of 2 rows"),
        ({"ends": torch.tensor([0, 1, 4])}, "do not fit"),
        ({"ends": torch.tensor([0, 4, 5])}, "leave sequence 1 fewer"),
        ({"reads": torch.tensor([0, 1, 2, 3, 9])}, "place (=9) is not one of 6"),
        ({"writes": torch.tensor([1, 2, -1])}, "place (=-1) is not one of 6"),
    ],
)
def test_pages_that_do_not_fit_are_an_error(change: dict[str, Tensor], message: str) -> None:
    d = decoder(8, NUMBERS, inner=48, blocks=2, level=8)
    given = {
        "lengths": torch.tensor([1, 2]),
        "ends": torch.tensor([0, 2, 5]),
        "reads": torch.arange(5),
        "writes": torch.tensor([1, 3, 4]),
    } | change
    caches = [torch.zeros(6, 2, 16) for _ in range(4)]
    lists = ([given[name]] * 2 for name in ("ends", "reads", "writes"))
    with pytest.raises((RuntimeError, IndexError), match=re.escape(message)):
        ops.decoder_blocks_paged(
            torch.ones(1, 3, d.width),
            d.handle,
            d.book,
            caches[:2],
            caches[2:],
            *d.angles(torch.arange(3)[None]),
            given["lengths"],
            *lists,
        )
