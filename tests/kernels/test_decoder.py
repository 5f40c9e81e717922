"""`decoder_blocks`: every instruction set gives what the reference gives, on any decoder that the op can express."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.decoder import reference
from kernels.cases import forced, isas
from kernels.decoder_cases import NUMBERS, Decoder, decoder, decoders, near
from tiny import generator

ensure_loaded()
ISAS = isas()
ops = torch.ops.foveate
needs_compiler = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")


def _both(d: Decoder, xs: list[Tensor], first: Tensor | None, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What the op and the reference make of consecutive parts of sequences: outputs, then caches."""
    batch, total = xs[0].shape[0], sum(x.shape[1] for x in xs)
    results: list[list[Tensor]] = [[], []]
    for got, (op, handle) in zip(
        results, ((ops.decoder_blocks, d.handle), (reference.decoder_blocks, d.expected)), strict=True
    ):
        keys, values = d.caches(batch, total + 3, dtype)
        past = 0
        for x in xs:
            turned = d.angles(torch.arange(past, past + x.shape[1])[None])
            got.append(op(x, handle, d.book, keys, values, *turned, first, [past] * d.blocks))
            past += x.shape[1]
        got += [*keys, *values]
    return list(zip(*results, strict=True))


@needs_compiler
@settings(max_examples=40)
@given(decoders(), st.integers(1, 3), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 100))
def test_every_instruction_set_gives_what_the_reference_gives(
    d: Decoder, batch: int, lengths: list[int], seed: int
) -> None:
    g = generator(seed)
    xs = [torch.randn(batch, n, d.width, generator=g) for n in lengths]
    first = torch.randint(0, lengths[0], (batch,), generator=g) if seed % 2 else None
    for isa in ISAS:
        with forced(isa):
            # an input of 16 bits has 32,512 codes: one code more or less in each of a few products that follow
            assert all(near(got, want, 1e-3) for got, want in _both(d, xs, first, torch.float32)), isa


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_go_in_and_come_out_and_are_cached(dtype: torch.dtype) -> None:
    d = decoder(3, NUMBERS, inner=48, blocks=2, level=16)
    xs = [torch.randn(2, n, d.width, generator=generator(n)).to(dtype) for n in (7, 1)]
    pairs = _both(d, xs, None, dtype)
    assert all(got.dtype == want.dtype == dtype for got, want in pairs)
    # values of 8 and 11 bits: rounded once more or less often
    assert all(near(got, want, 4 * torch.finfo(dtype).eps) for got, want in pairs)


@needs_compiler
@pytest.mark.parametrize(("level", "experts"), [(8, 0), (16, 0), (8, 6)])
def test_a_sequence_does_not_depend_on_its_batch_or_on_threads_or_on_how_it_is_cut(level: int, experts: int) -> None:
    numbers = replace(NUMBERS, experts=experts, top_k=3)
    d = decoder(5, numbers, inner=48, blocks=2, level=level)
    x = torch.randn(3, 530, d.width, generator=generator(1))

    def run(rows: Tensor, cuts: list[int]) -> Tensor:
        keys, values = d.caches(len(rows), 530, torch.float32)
        return torch.cat(
            [
                ops.decoder_blocks(
                    rows[:, a:b].contiguous(),
                    d.handle,
                    d.book,
                    keys,
                    values,
                    *d.angles(torch.arange(a, b)[None]),
                    None,
                    [a] * 2,
                )
                for a, b in pairwise([0, *cuts, 530])
            ],
            1,
        )

    whole = run(x, [])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x, []), whole)
        assert torch.equal(run(x[1:2], [255, 256, 258, 528, 529]), whole[1:2])
    assert torch.equal(run(x, [7, 400]), whole)


@needs_compiler
@pytest.mark.parametrize("experts", [0, 4])
def test_threads_that_are_late_change_nothing(experts: int) -> None:
    """There are more of them than processors, so that some are always late."""
    d = decoder(4, replace(NUMBERS, experts=experts, top_k=2), inner=48, blocks=3, level=8)
    x = torch.randn(1, 2, d.width, generator=generator(1))
    expected = None
    for call in range(150):
        torch.set_num_threads(8 if call else 1)
        keys, values = d.caches(1, 2, torch.float32)
        y = ops.decoder_blocks(x, d.handle, d.book, keys, values, *d.angles(torch.arange(2)[None]), None, [0] * 3)
        expected = y if expected is None else expected
        assert torch.equal(y, expected)


@needs_compiler
@pytest.mark.parametrize("experts", [0, 4])
def test_each_row_reads_its_own_map(experts: int) -> None:
    numbers = replace(NUMBERS, experts=experts, top_k=2, normalized=1)
    d = decoder(6, numbers, inner=48, blocks=2, level=8, maps=4)
    x = torch.randn(4, 3, d.width, generator=generator(2))
    turned = d.angles(torch.arange(3)[None])

    def run(rows: Tensor, classes: list[int]) -> Tensor:
        ops.rows_of_passes(d.book, torch.tensor(classes, dtype=torch.uint8))
        ops.begin_pass(d.book, 3)
        try:
            keys, values = d.caches(len(rows), 3, torch.float32)
            out: Tensor = ops.decoder_blocks(rows, d.handle, d.book, keys, values, *turned, None, [0, 0])
            return out
        finally:
            ops.end_pass(d.book)
            ops.rows_of_passes(d.book, None)

    together = run(x, [3, 0, 2, 1])
    for row, which in enumerate([3, 0, 2, 1]):
        assert torch.equal(run(x[row : row + 1], [which]), together[row : row + 1])
    assert not torch.equal(run(x[:1], [0]), run(x[:1], [3]))


@needs_compiler
@pytest.mark.parametrize("experts", [0, 4])
def test_rows_that_choose_between_two_maps_do_so_for_each_weight(experts: int) -> None:
    numbers = replace(NUMBERS, experts=experts, top_k=2, normalized=1)
    d = decoder(6, numbers, inner=48, blocks=2, level=16, maps=2, chooses=True)
    xs = [torch.randn(2, n, d.width, generator=generator(n)) for n in (5, 1)]
    for isa in ISAS:
        with forced(isa):
            assert all(near(got, want, 1e-3) for got, want in _both(d, xs, None, torch.float32)), isa


@needs_compiler
def test_a_value_that_is_no_number_stays_in_its_sequence() -> None:
    d = decoder(7, NUMBERS, inner=48, blocks=1, level=16)
    x = torch.randn(2, 5, d.width, generator=generator(3))
    x[0, 2, 1] = torch.nan
    keys, values = d.caches(2, 5, torch.float32)
    y = ops.decoder_blocks(x, d.handle, d.book, keys, values, *d.angles(torch.arange(5)[None]), None, [0])
    assert not bool(y[0, :2].isnan().any())
    assert bool(y[0, 2:].isnan().all())
    assert not bool(y[1].isnan().any())


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 5)}, "x has shape"),
        ({"x": torch.ones(2, 3, 58, dtype=torch.float64)}, "dtype"),
        ({"past": [0]}, "past positions"),
        ({"past": [-1, 0]}, "is not a number of positions"),
        ({"past": [9, 0]}, "the cache of block 0"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, "first has 3 values"),
        ({"first": torch.full((2,), -1)}, "is not a position"),
        ({"cosine": torch.zeros(1, 1, 4, 16)}, "cosine and sine"),
        ({"handle": torch.tensor([10**9])}, "stands for no decoder"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], message: str) -> None:
    d = decoder(8, NUMBERS, inner=48, blocks=2, level=8)
    keys, values = d.caches(2, 4, torch.float32)
    cosine, sine = d.angles(torch.arange(3)[None])
    args = {
        "x": torch.ones(2, 3, d.width),
        "handle": d.handle,
        "cosine": cosine,
        "first": None,
        "past": [0, 0],
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.decoder_blocks(
            args["x"], args["handle"], d.book, keys, values, args["cosine"], sine, args["first"], args["past"]
        )


def test_the_op_keeps_to_its_schema() -> None:
    d = decoder(9, NUMBERS, inner=48, blocks=1, level=8)
    keys, values = d.caches(1, 4, torch.float32)
    for cache in (*keys, *values):
        cache.zero_()
    args = (torch.ones(1, 3, d.width), d.handle, d.book, keys, values, *d.angles(torch.arange(3)[None]), None, [0])
    torch.library.opcheck(ops.decoder_blocks.default, args, test_utils=("test_schema", "test_faketensor"))
