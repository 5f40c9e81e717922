"""Random decoders for the op `decoder_blocks` and for its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.decoder import reference
from foveate.kernels.decoder.numbers import Constants, Numbers
from foveate.kernels.planes import reference as planes_reference
from tiny import coded, generator, random_levels

ensure_loaded()
ops = torch.ops.foveate

#: In place of bits, numbers as they are.
EXACT = 0

NUMBERS = Numbers(
    heads=4, kv_heads=2, head_size=16, rotary_size=16, rotary_table=0, window=0, whole_norms=0, activation=0
)


@dataclass
class Decoder:
    """A random decoder, by the handles of the compiled op and of the reference."""

    width: int
    numbers: Numbers
    blocks: int
    tables: int
    handle: Tensor
    expected: Tensor
    book: Tensor
    tensors: list[Tensor]
    made_of: tuple[Any, ...]

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


def decoder(seed: int, numbers: Numbers, *, inner: int, blocks: int, level: int, **kinds: Any) -> Decoder:
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
    constants = kinds.get("constants", Constants(scale=numbers.head_size**-0.5, cap=0.0, residual=1.0))
    tables = kinds.get("tables", 1)
    flat = [*vars(numbers).values(), *kinds.get("norms", (1, 0, 0, 0, 1, 0))] * blocks + [
        1,
        width,
        max(numbers.rotary_size, 2),
        tables,
    ]
    floats = [*vars(constants).values(), *[1e-5] * 6] * blocks + [1e-6]
    arguments = [(groups, biases, norms, routers, experts, flat, floats) for groups, experts in held]
    handles = [make(*own) for make, own in zip((ops.decoder_handle, reference.decoder_handle), arguments, strict=True)]
    kept += [*biases, *norms, *routers]
    return Decoder(width, numbers, blocks, tables, *handles, book, kept, arguments[0])


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    kv_heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = draw(st.sampled_from((4, 12, 16, 40, 64)))
    numbers = Numbers(
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
        constants=Constants(
            scale=0.3, cap=draw(st.sampled_from((0.0, 5.0))), residual=draw(st.sampled_from((1.0, 0.5)))
        ),
    )


def pair_of(x_NBhDK: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The two tensors of some heads."""
    if bits == EXACT:
        return x_NBhDK.to(dtype), torch.empty(0)
    runs, batch, heads, size, block = x_NBhDK.shape
    codes, ranges = ops.group_pack(x_NBhDK.contiguous(), bits, block, None)
    return codes.view(runs, batch, -1), ranges.view(runs, batch, heads * size, 2)


def packed_of(
    d: Decoder, batch: int, runs: int, block: int, bits: Sequence[int], seed: int
) -> tuple[list[Tensor], Tensor]:
    """Random packed positions: heads take turns with `bits`; keys and values of one number of bits share tensors."""
    g, heads, size = generator(seed), d.numbers.kv_heads, d.numbers.head_size
    parts: list[Tensor] = []
    places = torch.full((d.blocks, 2, heads, 2), -1)
    for number in range(d.blocks):
        for kind in range(2):
            of_head = [bits[(h + kind + number) % len(bits)] for h in range(heads)]
            for level in set(of_head):
                which = [h for h in range(heads) if of_head[h] == level]
                places[number, kind, which] = torch.tensor([[len(parts) // 2, i] for i in range(len(which))])
                x = torch.randn(runs, batch, len(which), size, block, generator=g)
                parts += pair_of(x, level, torch.bfloat16 if seed % 2 else torch.float32)
    return parts, places


def near(got: Tensor, expected: Tensor, error: float) -> bool:
    same_gaps = torch.equal(got.isnan(), expected.isnan())
    got, expected = got.float().nan_to_num(), expected.float().nan_to_num()
    return same_gaps and float((got - expected).norm()) <= error * float(expected.norm()) + 1e-20
