"""`decoder_blocks_packed`: older positions are read from packed blocks, whatever the bits of each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.decoder import reference
from foveate.kernels.decoder.packed import unpacked
from kernels.cases import forced, isas
from kernels.decoder_cases import EXACT, NUMBERS, Decoder, decoder, decoders, near, packed_of
from tiny import generator

ensure_loaded()
ISAS = isas()
ops = torch.ops.foveate
pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")


def run(
    op: Any,
    handle: Tensor,
    d: Decoder,
    xs: list[Tensor],
    first: Tensor | None,
    packed: tuple[list[Tensor], Tensor, int],
) -> list[Tensor]:
    """Outputs of consecutive parts of sequences after packed positions, then the exact caches."""
    parts, places, block = packed
    total = sum(x.shape[1] for x in xs)
    keys, values = d.caches(xs[0].shape[0], total + 2, torch.float32)
    before, past, got = parts[0].shape[0] * block, 0, []
    for x in xs:
        turned = d.angles(torch.arange(before + past, before + past + x.shape[1])[None])
        got.append(op(x, handle, d.book, keys, values, *turned, first, [past] * d.blocks, parts, places, block))
        past += x.shape[1]
    return [*got, *keys, *values]


@settings(max_examples=30)
@given(
    decoders(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from((32, 64, 128, 256)),
    st.lists(st.sampled_from((2, 4, 8, 16, EXACT)), min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 100),
)
def test_every_instruction_set_gives_what_the_reference_gives(
    d: Decoder, batch: int, runs: int, block: int, bits: list[int], lengths: list[int], seed: int
) -> None:
    g = generator(seed)
    packed = *packed_of(d, batch, runs, block, bits, seed), block
    xs = [torch.randn(batch, n, d.width, generator=g) for n in lengths]
    first = torch.randint(0, runs * block + lengths[0], (batch,), generator=g) if seed % 3 == 0 else None
    expected = run(reference.decoder_blocks_packed, d.expected, d, xs, first, packed)
    for isa in ISAS:
        with forced(isa):
            got = run(ops.decoder_blocks_packed, d.handle, d, xs, first, packed)
        assert all(near(a, b, 1e-3) for a, b in zip(got, expected, strict=True)), isa


def test_a_sequence_does_not_depend_on_its_batch_or_on_threads_or_on_how_it_is_cut() -> None:
    d = decoder(5, NUMBERS, inner=48, blocks=2, level=16)
    parts, places = packed_of(d, 3, 7, 64, [4, 2, EXACT], 1)
    x = torch.randn(3, 530, d.width, generator=generator(1))

    def outputs(rows: Tensor, of: list[Tensor], cuts: list[int]) -> Tensor:
        xs = [part.contiguous() for part in rows.split(cuts, 1)]
        return torch.cat(run(ops.decoder_blocks_packed, d.handle, d, xs, None, (of, places, 64))[: len(xs)], 1)

    whole = outputs(x, parts, [530])
    alone = [part[:, 1:2].contiguous() if part.numel() else part for part in parts]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(outputs(x, parts, [530]), whole)
        assert torch.equal(outputs(x[1:2], alone, [63, 1, 448, 17, 1]), whole[1:2])


def test_packed_positions_are_read_as_exact_ones_are() -> None:
    """The same numbers, once unpacked into exact caches, give the same up to rounding."""
    d = decoder(8, NUMBERS, inner=48, blocks=2, level=16)
    parts, places = packed_of(d, 2, 5, 64, [8, 4], 3)
    x = torch.randn(2, 6, d.width, generator=generator(4))
    got = run(ops.decoder_blocks_packed, d.handle, d, [x], None, (parts, places, 64))[0]
    before = unpacked([d.numbers.head_size] * 2, parts, places, 64)
    keys, values = d.caches(2, 326, torch.float32)
    for number, numbers in before.items():
        for cache, own in zip((keys[number], values[number]), numbers, strict=True):
            cache[:, :, :320] = own
    turned = d.angles(torch.arange(320, 326)[None])
    exact = ops.decoder_blocks(x, d.handle, d.book, keys, values, *turned, None, [320] * 2)
    assert near(got, exact, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 96}, "32, 64, 128 or 256"),
        ({"block": 256}, "not one of 2, 4, 8 or 16 bits"),
        ({"places": torch.zeros(3, dtype=torch.int64)}, "too few"),
        ({"places": torch.full((2, 2, 2, 2), 9)}, r"pair \(=9\)"),
        ({"places": torch.tensor([0, 7]).repeat(8)}, r"place \(=7\)"),
        ({"places": torch.tensor([0, 0, -1, 0]).repeat(4)}, "packed positions"),
        ({"places": torch.zeros(2, 2, 2, 3, dtype=torch.int64)}, "places has 24 values"),
        ({"packed": 1}, "not pairs"),
        ({"dtype": torch.int32}, "uint8|Byte"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], message: str) -> None:
    d = decoder(5, NUMBERS, inner=48, blocks=2, level=16)
    parts, places = packed_of(d, 1, 2, 64, [4], 1)
    given_parts = parts[: change["packed"]] if "packed" in change else parts
    if "dtype" in change:
        given_parts = [parts[0].to(change["dtype"]), *parts[1:]]
    keys, values = d.caches(1, 4, torch.float32)
    turned = d.angles(torch.arange(128, 131)[None])
    with pytest.raises((RuntimeError, IndexError), match=message):
        ops.decoder_blocks_packed(
            torch.zeros(1, 3, d.width),
            d.handle,
            d.book,
            keys,
            values,
            *turned,
            None,
            [0, 0],
            given_parts,
            change.get("places", places),
            change.get("block", 64),
        )
