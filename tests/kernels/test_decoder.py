"""`decoder_blocks`: every instruction set gives what the reference gives, on any decoder that the op can express."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.decoder import reference
from foveate.kernels.planes import reference as planes_reference
from kernels.cases import forced, isas
from tiny import coded, generator, random_levels

ensure_loaded()
ISAS = isas()
ops = torch.ops.foveate
needs_compiler = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")


@dataclass
class Decoder:
    """A random decoder, by the handles of the compiled op and of the reference."""

    width: int
    numbers: reference.Numbers
    blocks: int
    tables: int
    handle: Tensor
    expected: Tensor
    book: Tensor
    tensors: list[Tensor]

    def caches(self, batch: int, room: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Caches full of NaN, so that a position that nobody wrote shows."""
        shape = (batch, self.numbers.kv_heads, room, self.numbers.head_size)
        return tuple([torch.full(shape, torch.nan, dtype=dtype) for _ in range(self.blocks)] for _ in range(2))  # type: ignore[return-value]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tables, B, S, rotary size] of positions [B, S]."""
        size = max(self.numbers.rotary_size, 2)
        speed = 0.5 ** torch.arange(size // 2).repeat(2)
        turned = torch.stack([positions[..., None] * speed * (t + 1) for t in range(self.tables)])
        return turned.cos(), turned.sin()


def decoder(seed: int, numbers: reference.Numbers, *, inner: int, blocks: int, level: int, **kinds: Any) -> Decoder:
    """A decoder of random weights.

    Args:
        kinds: `norms`, the kinds of the norms of a block; `joined`, whether q, k and v are one weight, as gate and up;
            `biases`; `constants`; `maps`, of which each row of a pass reads one.
    """
    g = generator(seed)
    width = max(10, numbers.heads * numbers.head_size - 6)
    q, k = numbers.heads * numbers.head_size, numbers.kv_heads * numbers.head_size
    joined = kinds.get("joined", False)
    mlp = [[(2 * inner, width)] if joined else [(inner, width)] * 2, [(width, inner)]]
    shapes = [[(q + 2 * k, width)] if joined else [(q, width), (k, width), (k, width)], [(width, q)]]
    shapes += [[(2 * inner, width)], [(width, inner)]] * numbers.experts if numbers.experts else mlp
    sites = len(shapes) * blocks  # inputs, one for each list of shapes
    weights = [
        coded(*s, group=32, seed=seed + i).planes
        for i, s in enumerate([s for _ in range(blocks) for part in shapes for s in part])
    ]
    maps = kinds.get("maps", 1)
    tiles = [w.stored_levels.numel() for w in weights]
    book = ops.generation_book(torch.empty(0), tiles, sites)
    levels = [
        torch.cat([random_levels(w, seed + 7 * m, (2, 3, 4, 6, 8)).flatten() for w in weights]) for m in range(maps)
    ]
    pairs = torch.arange(maps, dtype=torch.uint8)[:, None].repeat(1, 2)
    inputs = torch.full((maps, sites), level, dtype=torch.uint8)
    choices: list[Tensor] = []
    if kinds.get("chooses"):  # every other weight is read at the higher map, whatever its input
        thresholds = torch.tensor([0.0, torch.inf]).repeat(len(weights))[: len(weights)]
        begins = torch.arange(len(weights) + 1)[None]
        sample = torch.zeros(len(weights), dtype=torch.int64), torch.ones(len(weights), 16)
        counts = torch.zeros(1, len(weights), 2, dtype=torch.int64)
        choices = [torch.tensor([[1, 0]], dtype=torch.uint8), thresholds[None], begins, *sample, counts]
        pairs = torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8)
    ops.publish(book, torch.stack(levels), inputs, torch.zeros(2 * sites), pairs, choices)
    held: list[tuple[list[Tensor], list[Tensor]]] = [
        ([], []),
        ([], []),
    ]  # groups and experts, of the op and the reference
    biases, norms, routers, kept = [], [], [], []
    at = 0
    for b in range(blocks):
        for number, part in enumerate(shapes):
            own = weights[at : at + len(part)]
            tensors, geometry = [t for w in own for t in w.tensors], [n for w in own for n in w.geometry]
            one, site = torch.full((1,), level, dtype=torch.uint8), b * len(shapes) + number
            args = (tensors, geometry, [one] * len(own), [], list(range(at, at + len(own))), [site] * len(own))
            is_expert = bool(numbers.experts) and number >= 2
            for lists, make in zip(held, (ops.plane_handle, planes_reference.plane_handle), strict=True):
                lists[is_expert].append(make(*args))
            kept += tensors
            at += len(own)
            if not is_expert:
                made = [torch.randn(w.rows, generator=g) if kinds.get("biases") else torch.empty(0) for w in own]
                biases += [*made, *[torch.empty(0)] * (reference.GROUPS[number] - len(own))]
        if numbers.experts:
            biases += [torch.empty(0)] * 3
            for groups, _ in held:
                groups += [torch.empty(0)] * 2
        routers.append(torch.randn(numbers.experts, width, generator=g) if numbers.experts else torch.empty(0))
        sizes = (
            width,
            q if numbers.whole_norms else numbers.head_size,
            k if numbers.whole_norms else numbers.head_size,
            *[width] * 3,
        )
        of_block = kinds.get("norms", (1, 0, 0, 0, 1, 0))
        norms += [
            torch.randn(n, generator=g) * 0.2 + 1 if kind else torch.empty(0)
            for n, kind in zip(sizes, of_block, strict=True)
        ]
    norms.append(torch.randn(width, generator=g) * 0.2 + 1)
    constants = kinds.get("constants", reference.Constants(scale=numbers.head_size**-0.5, cap=0.0, residual=1.0))
    tables = kinds.get("tables", 1)
    flat = [*vars(numbers).values(), *kinds.get("norms", (1, 0, 0, 0, 1, 0))] * blocks + [
        1,
        width,
        max(numbers.rotary_size, 2),
        tables,
    ]
    floats = [*vars(constants).values(), *[1e-5] * 6] * blocks + [1e-6]
    handles = [
        make(groups, biases, norms, routers, experts, flat, floats)
        for make, (groups, experts) in zip((ops.decoder_handle, reference.decoder_handle), held, strict=True)
    ]
    return Decoder(width, numbers, blocks, tables, *handles, book, kept)


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    kv_heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = draw(st.sampled_from((4, 12, 16, 40, 64)))
    numbers = reference.Numbers(
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        head_size=size,
        rotary_size=draw(st.sampled_from((0, 4, size))),
        rotary_table=draw(st.integers(0, 1)),
        window=draw(st.sampled_from((0, 0, 1, 3, 300))),
        whole_norms=draw(st.integers(0, 1)),
        activation=draw(st.integers(0, 3)),
        experts=draw(st.sampled_from((0, 0, 1, 5))),
        top_k=1,
        normalized=draw(st.integers(0, 1)),
    )
    if numbers.experts > 1:
        numbers = replace(numbers, top_k=draw(st.integers(1, 4)))
    norm = st.integers(0, 2)
    return decoder(
        draw(st.integers(0, 1000)),
        numbers,
        inner=draw(st.sampled_from((5, 32, 70))),
        blocks=draw(st.integers(1, 2)),
        level=draw(st.sampled_from((16, 16, 32))),
        joined=draw(st.booleans()),
        biases=draw(st.booleans()),
        tables=2,
        norms=tuple(draw(norm) for _ in range(6)),
        constants=reference.Constants(
            scale=0.3, cap=draw(st.sampled_from((0.0, 5.0))), residual=draw(st.sampled_from((1.0, 0.5)))
        ),
    )


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


def _near(got: Tensor, expected: Tensor, error: float) -> bool:
    same_gaps = torch.equal(got.isnan(), expected.isnan())
    got, expected = got.float().nan_to_num(), expected.float().nan_to_num()
    return same_gaps and float((got - expected).norm()) <= error * float(expected.norm()) + 1e-20


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
            assert all(_near(got, want, 1e-3) for got, want in _both(d, xs, first, torch.float32)), isa


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
            assert all(_near(a, b, error) for a, b in zip(got, expected, strict=True)), isa


NUMBERS = reference.Numbers(
    heads=4, kv_heads=2, head_size=16, rotary_size=16, rotary_table=0, window=0, whole_norms=0, activation=0
)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_go_in_and_come_out_and_are_cached(dtype: torch.dtype) -> None:
    d = decoder(3, NUMBERS, inner=48, blocks=2, level=16)
    xs = [torch.randn(2, n, d.width, generator=generator(n)).to(dtype) for n in (7, 1)]
    pairs = _both(d, xs, None, dtype)
    assert all(got.dtype == want.dtype == dtype for got, want in pairs)
    # values of 8 and 11 bits: rounded once more or less often
    assert all(_near(got, want, 4 * torch.finfo(dtype).eps) for got, want in pairs)


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
            assert all(_near(got, want, 1e-3) for got, want in _both(d, xs, None, torch.float32)), isa


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


def test_the_op_keeps_to_its_schema() -> None:
    d = decoder(9, NUMBERS, inner=48, blocks=1, level=8)
    keys, values = d.caches(1, 4, torch.float32)
    for cache in (*keys, *values):
        cache.zero_()
    args = (torch.ones(1, 3, d.width), d.handle, d.book, keys, values, *d.angles(torch.arange(3)[None]), None, [0])
    torch.library.opcheck(ops.decoder_blocks.default, args, test_utils=("test_schema", "test_faketensor"))
