"""The meaning of a decoder's ops, in plain torch.

A block of a decoder, for hidden states h [B, S, H]:

    q, k, v = products of norm(h)
    q and k are normed, head by head or whole, then turned by the angles of their position
    k and v are put into the caches at positions past .. past + S
    o = product of attention(q, cached k, cached v)
    h = h + residual * norm(o)
    gate, up = products of norm(h)
    d = product of activation(gate) * up
    h = h + residual * norm(d)

In a mixture gate, up and down are those of the experts that a router gives a row the most of, and d is their sum by
their shares.

Each norm may be none. After the last block h is normed once more. A query at position p of sequence b sees cached
positions from max(first[b], p - window + 1) up to p; one that sees none gets zeros.

Shapes: B sequences, S positions of each in this call, H model width, D head size, T positions of a cache.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.decoder.numbers import ACTIVATIONS, GROUPS, NO_NORM, NORMS, RMS_NORM_ONE_PLUS, Constants, Numbers
from foveate.kernels.decoder.packed import unpacked
from foveate.kernels.planes.reference import plane_linear_by_handle, rows_of_handle


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm: its kind, its weight (empty for none) and its epsilon."""

    kind: int
    weight: Tensor
    eps: float

    def of(self, x: Tensor) -> Tensor:
        """x [..., N], normed over its last dimension."""
        if self.kind == NO_NORM:
            return x
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return unit * (self.weight + (self.kind == RMS_NORM_ONE_PLUS))


@dataclass(frozen=True, eq=False)
class _Block:
    groups: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    norms: tuple[Norm, ...]
    numbers: Numbers
    constants: Constants
    router: Tensor
    experts: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Decoder:
    blocks: tuple[_Block, ...]
    last: Norm


_DECODERS: dict[int, _Decoder] = {}
#: The `places` of packed heads where there are none.
_NOWHERE = torch.empty(0, 2, 0, 2, dtype=torch.int64)
_NUMBERS = itertools.count(1)


def decoder_handle(
    groups: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    routers: Sequence[Tensor],
    experts: Sequence[Tensor],
    numbers: Sequence[int],
    constants: Sequence[float],
) -> Tensor:
    """A tensor, int64 [1], that stands for the blocks of a decoder, as long as it lives.

    Args:
        groups: for each block the handles (`plane_handle`) of its four groups of weights.
        biases: for each block seven: of q, k and v, of the output, of gate and up, and of down. They are float32, empty
            where there is none. A weight that is several has its bias at the place of the first.
        norms: for each block the weights of its six norms, float32, then that of the last norm; empty for none.
        routers: for each block float32 [experts, H], empty where there is one MLP. Of a block with experts the
            last two groups are not looked at.
        experts: the handles of each expert's two weights, gate and up as one and down, for all blocks.
        numbers: for each block its `Numbers`, then the kinds of its norms; at last the kind of the last norm, the model
            width, the rotary size and the number of tables of angles.
        constants: for each block its `Constants`, then the epsilons of its norms; at last that of the last norm.
    """
    count = len(groups) // len(GROUPS)
    own, per_constants = len(fields(Numbers)), 3 + NORMS
    per_numbers = own + NORMS
    sizes = (len(groups), len(biases), len(norms), len(numbers), len(constants))
    if sizes != (4 * count, 7 * count, NORMS * count + 1, per_numbers * count + 4, per_constants * count + 1):
        raise RuntimeError(f"of {count} blocks there are groups, biases, norms, numbers and constants (={sizes})")
    blocks, left = [], list(experts)
    for b in range(count):
        own_numbers = numbers[b * per_numbers : (b + 1) * per_numbers]
        own_constants = constants[b * per_constants : (b + 1) * per_constants]
        own_norms = zip(own_numbers[own:], norms[b * NORMS : (b + 1) * NORMS], own_constants[3:], strict=True)
        of_block = Numbers(*own_numbers[:own])
        blocks.append(
            _Block(
                tuple(groups[4 * b : 4 * b + 4]),
                tuple(biases[7 * b : 7 * b + 7]),
                tuple(Norm(kind, weight, eps) for kind, weight, eps in own_norms),
                of_block,
                Constants(*own_constants[:3]),
                routers[b],
                tuple(left[: 2 * of_block.experts]),
            )
        )
        left = left[2 * of_block.experts :]
    number = next(_NUMBERS)
    _DECODERS[number] = _Decoder(tuple(blocks), Norm(numbers[-4], norms[-1], constants[-1]))
    handle = torch.tensor([number])
    weakref.finalize(handle, _DECODERS.pop, number)
    return handle


def decoder_blocks(
    x: Tensor,
    handle: Tensor,
    book: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    first: Tensor | None,
    past: Sequence[int],
) -> Tensor:
    """Hidden states x [B, S, H] after all blocks and the last norm, in the dtype of x.

    Args:
        x: hidden states; float32, bfloat16 or float16.
        handle: of the blocks.
        book: of the generations of the model.
        keys, values: for each block [B, kv_heads, T, D], which are written at positions past .. past + S. Blocks may
            have the same where B * S is at most `ROWS_AT_ONCE`.
        cosine, sine: the angles of this call's positions, float32 [tables, B or 1, S, rotary size].
        first: int64 [B], the first cached position of each sequence that is no padding, in all caches; None for 0.
        past: for each block how many positions `keys` and `values` hold.
    """
    return decoder_blocks_packed(x, handle, book, keys, values, cosine, sine, first, past, (), _NOWHERE, 0)


def decoder_blocks_packed(
    x: Tensor,
    handle: Tensor,
    book: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    first: Tensor | None,
    past: Sequence[int],
    packed: Sequence[Tensor],
    places: Tensor,
    block: int,
) -> Tensor:
    """As `decoder_blocks`, where older positions lie packed before those of `keys` and `values`.

    Args:
        x, handle, book, keys, values, cosine, sine, first, past: as for `decoder_blocks`.
        packed: pairs of tensors with the older positions, of N runs of `block` tokens of h heads: codes uint8
            [N, B, C] and ranges bfloat16 [N, B, h * D, 2] as `group_pack` makes them, one group a channel; or the exact
            numbers [N, B, h, D, block] and an empty tensor.
        places: int64 [blocks, 2, kv_heads, 2]: the pair in which the keys, and then the values, of each head are, and
            the head's place in it; the pair is -1 where none are packed. Heads of a block have as many positions.
        block: 32, 64, 128 or 256.
    """
    decoder = _decoder_of(handle)
    before = unpacked([one.numbers.head_size for one in decoder.blocks], packed, places, block)
    length = x.shape[1]

    def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = past[number]
        for cache, new in ((keys[number], k), (values[number], v)):
            cache[:, :, held : held + length] = new.transpose(1, 2).to(cache.dtype)
        seen_keys, seen_values = (cache[number][:, :, : held + length].float() for cache in (keys, values))
        if number in before:
            packed_keys, packed_values = before[number]
            seen_keys, seen_values = torch.cat([packed_keys, seen_keys], 2), torch.cat([packed_values, seen_values], 2)
        return _attention(q, seen_keys, seen_values, decoder.blocks[number], first)

    return _through(decoder, x, book, cosine, sine, attention)


def decoder_blocks_paged(
    x: Tensor,
    handle: Tensor,
    book: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    lengths: Tensor,
    ends: Sequence[Tensor],
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
) -> Tensor:
    """As `decoder_blocks`, for sequences of any lengths whose cached positions lie anywhere.

    Args:
        x: hidden states [1, S, H], sequence after sequence.
        handle, book: as for `decoder_blocks`.
        keys, values: for each block [places, kv_heads, D].
        cosine, sine: the angles of the rows of x, float32 [tables, 1, S, rotary size].
        lengths: int64, the rows of each sequence.
        ends: for each block int64 [sequences + 1]: reads[ends[i] : ends[i + 1]] are the places of sequence i.
        reads: for each block int64, the places of all positions of each sequence, in order; the last ones are the new.
        writes: for each block int64 [S], the place of each row.
    """
    decoder = _decoder_of(handle)

    def attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in ((keys[number], k), (values[number], v)):
            cache[writes[number]] = new[0].to(cache.dtype)
        made, row = [], 0
        for i, length in enumerate(lengths.tolist()):
            places = reads[number][int(ends[number][i]) : int(ends[number][i + 1])]
            seen_keys, seen_values = (cache[number][places].transpose(0, 1)[None].float() for cache in (keys, values))
            made.append(_attention(q[:, row : row + length], seen_keys, seen_values, decoder.blocks[number], None))
            row += length
        return torch.cat(made, 1)

    return _through(decoder, x, book, cosine, sine, attention)


def _decoder_of(handle: Tensor) -> _Decoder:
    if int(handle) not in _DECODERS:
        raise RuntimeError(f"decoder (={int(handle)}) stands for no decoder of this process: it is gone")
    return _DECODERS[int(handle)]


def _through(
    decoder: _Decoder,
    x: Tensor,
    book: Tensor,
    cosine: Tensor,
    sine: Tensor,
    attention: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """x through all blocks. `attention` takes the number of a block and its q, k and v [B, S, heads, D]."""
    h = x.float()
    for number, block in enumerate(decoder.blocks):
        n, norms = block.numbers, block.norms
        shapes = (n.heads * n.head_size, n.kv_heads * n.head_size, n.kv_heads * n.head_size)
        q, k, v = _products(block, 0, norms[0].of(h), book).split(shapes, -1)
        angles = (cosine[n.rotary_table], sine[n.rotary_table]) if n.rotary_size else None
        q = _placed(q, norms[1], n.heads, n, angles) * block.constants.scale
        k = _placed(k, norms[2], n.kv_heads, n, angles)
        attended = attention(number, q, k, v.unflatten(-1, (n.kv_heads, -1)))
        h = h + block.constants.residual * norms[3].of(_products(block, 1, attended, book))
        x_in = norms[4].of(h)
        if n.experts:
            out = _mixture(block, x_in, book)
        else:
            out = _products(block, 3, _gated(block, _products(block, 2, x_in, book)), book)
        h = h + block.constants.residual * norms[5].of(out)
    return decoder.last.of(h).to(x.dtype)


def _gated(block: _Block, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return ACTIVATIONS[block.numbers.activation][1](gate) * up


def _mixture(block: _Block, x: Tensor, book: Tensor) -> Tensor:
    """The experts of each row, added up by their shares. Rows do not depend on each other, so here all take all."""
    n = block.numbers
    shares, chosen = torch.softmax(x @ block.router.t(), -1).topk(n.top_k)
    if n.normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for rank in range(n.top_k):
        for expert in chosen[..., rank].unique().tolist():
            up, down = block.experts[2 * expert : 2 * expert + 2]
            y = _product(down, _gated(block, _product(up, x, book)), book)
            out = torch.where((chosen[..., rank] == expert)[..., None], out + shares[..., rank, None] * y, out)
    return out


def _product(handle: Tensor, x: Tensor, book: Tensor) -> Tensor:
    return plane_linear_by_handle(x.contiguous(), handle, book, None, [], rows_of_handle(handle))[0]


def _products(block: _Block, group: int, x: Tensor, book: Tensor) -> Tensor:
    """The products of a group's weights, one after the other in the last dimension."""
    first, handle = sum(GROUPS[:group]), block.groups[group]
    rows = rows_of_handle(handle)
    return torch.cat(
        plane_linear_by_handle(x.contiguous(), handle, book, None, block.biases[first : first + len(rows)], rows), -1
    )


def _placed(x: Tensor, norm: Norm, heads: int, n: Numbers, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys [B, S, heads * D], normed and turned: [B, S, heads, D]."""
    split = norm.of(x).unflatten(-1, (heads, -1)) if n.whole_norms else norm.of(x.unflatten(-1, (heads, -1)))
    if angles is None:
        return split
    turned, rest = split[..., : n.rotary_size], split[..., n.rotary_size :]
    front, back = turned.chunk(2, -1)
    cosine, sine = (table[:, :, None] for table in angles)
    return torch.cat([turned * cosine + torch.cat([-back, front], -1) * sine, rest], -1)


def _attention(q: Tensor, keys: Tensor, values: Tensor, block: _Block, first: Tensor | None) -> Tensor:
    """q [B, S, heads, D], keys and values [B, kv_heads, T, D] -> [B, S, heads * D]."""
    n, length, total = block.numbers, q.shape[1], keys.shape[2]
    shared = n.heads // n.kv_heads
    scores = q.transpose(1, 2) @ keys.repeat_interleave(shared, 1).transpose(2, 3)
    if block.constants.cap:
        scores = block.constants.cap * torch.tanh(scores / block.constants.cap)
    position = torch.arange(total - length, total)[:, None]
    cached = torch.arange(total)
    seen: Any = cached <= position
    if n.window:
        seen = seen & (cached > position - n.window)
    seen = seen[None, None]
    if first is not None:
        seen = seen & (cached >= first[:, None, None, None])
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    return (weights @ values.repeat_interleave(shared, 1)).transpose(1, 2).flatten(2)
