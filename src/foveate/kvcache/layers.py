"""A transformers `Cache` whose older tokens are packed, at a level of their own for each layer and head.

    [ packed blocks of `block` tokens ............ | exact: the last `window` to `window + block - 1` tokens ]

New tokens are appended to the exact end. Attention reads all packed tokens, unpacked for this layer and this call, and
the exact end. Afterwards the oldest tokens of the exact end are packed, if it holds a whole block more than the window.
So the stored form depends only on the tokens, not on how many came at a time, and a prompt attends to itself exactly.

Layers that are not plain attention (sliding windows, linear attention, layers that share another's keys) keep the cache
that transformers gives them.

Legend: B sequences, H heads of keys and values, T tokens, D channels a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from foveate.kvcache.blocks import PackedHeads
from foveate.kvcache.decoder_rooms import Rooms
from foveate.nn.decoder.caches import Room
from foveate.nn.decoder.structure import Structure

Levels = int | Sequence[int]

#: Whether `crop` is told how many tokens to remove (as a negative number). Up to transformers 5.14 it was told how many
#: to keep, or, as a negative number, how many to remove.
_CROP_REMOVES = "max_length" not in inspect.signature(DynamicLayer.crop).parameters


class History:
    """The keys, or the values, of a layer: packed blocks and an exact end.

    The memory of the exact end may have room for tokens to come (`room`), which is used once: what is put in by others
    replaces it.

    Attributes:
        packed: the older tokens.
    """

    def __init__(self, levels: Levels, block: int, like_BHTD: Tensor) -> None:
        self.packed = PackedHeads(levels, block)
        self.end_BHTD = like_BHTD[:, :, :0].clone()

    @property
    def end_BHTD(self) -> Tensor:
        """The recent tokens."""
        return self._room[:, :, : self._length]

    @end_BHTD.setter
    def end_BHTD(self, value_BHTD: Tensor) -> None:
        self._room, self._length = value_BHTD, value_BHTD.shape[2]

    def room(self, tokens: int, usual: int) -> Tensor:
        """Memory that begins with the exact end, for so many tokens more, and for `usual` tokens at least."""
        batch, heads, _, width = self._room.shape
        if self._room.shape[2] < self._length + tokens:
            room_BHTD = self._room.new_empty(batch, heads, max(self._length + tokens, usual), width)
            room_BHTD[:, :, : self._length] = self.end_BHTD
            self._room = room_BHTD
        return self._room

    def advance(self, tokens: int) -> None:
        """Count so many tokens that were written to the room."""
        self._length += tokens

    def read(self, kept: Sequence[int]) -> Tensor:
        """All tokens [B, H, T, D]; `kept` says how many there are in each packed block."""
        if not kept:
            return self.end_BHTD
        before = sum(kept)
        batch, heads, tokens, width = self.end_BHTD.shape
        out_BHTD = self.end_BHTD.new_empty(batch, heads, before + tokens, width)
        with torch.no_grad():
            self.packed.fill(out_BHTD, kept)
        out_BHTD[:, :, before:] = self.end_BHTD
        return out_BHTD

    @torch.no_grad()
    def pack(self, tokens: int) -> None:
        """Pack the oldest tokens of the exact end."""
        self.packed.append(self.end_BHTD[:, :, :tokens])
        self.end_BHTD = self.end_BHTD[:, :, tokens:].clone()  # a copy, so that the memory of the packed tokens is freed

    def crop(self, blocks: int, tokens: int) -> None:
        """Keep the first blocks, and the first tokens of the exact end."""
        self.packed.truncate(blocks)
        self.end_BHTD = self.end_BHTD[:, :, :tokens]

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order, as often as they are named."""
        self.packed.select(index_B)
        self.end_BHTD = self.end_BHTD.index_select(0, index_B)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.packed.nbytes + self._room.numel() * self._room.element_size()


class QuantizedLayer(DynamicLayer):
    """One layer's keys and values. Gradients flow through the exact end only.

    Args:
        key_levels, value_levels: one level for all heads, or one for each head of keys and values.
        window: at least this many recent tokens stay exact.
        block: tokens that are packed together.
    """

    # assisted decoding asks for it: a crop removes tokens, but older tokens that were packed because of them stay
    # packed
    is_croppable = True

    def __init__(self, key_levels: Levels, value_levels: Levels, window: int, block: int) -> None:
        # without the __init__ of transformers, which sets `keys` and `values`: here both are computed
        self.key_levels, self.value_levels = key_levels, value_levels
        self.window, self.block = window, block
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._histories: tuple[History, ...] = ()
        #: Tokens read of each packed block: all of them, except in a block that `crop` shortened.
        self._kept: list[int] = []
        #: How often what is packed has changed.
        self.changes = getattr(self, "changes", 0) + 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin an empty cache of tokens like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._histories = (
            History(self.key_levels, self.block, key_states),
            History(self.value_levels, self.block, value_states),
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens [B, H, T, D]. Returns all keys and values, as they are read this time."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for history, new_BHTD in zip(self._histories, (key_states, value_states), strict=True):
            history.end_BHTD = torch.cat([history.end_BHTD, new_BHTD], dim=-2)
        keys, values = (history.read(self._kept) for history in self._histories)
        self._pack_what_is_old()
        return keys, values

    def _pack_what_is_old(self) -> None:
        ready = (self.exact_tokens - self.window) // self.block
        if ready > 0:
            for history in self._histories:
                history.pack(ready * self.block)
            self._kept += [self.block] * ready
            self.changes += 1

    def room(self, tokens: int, like_BHTD: Tensor) -> tuple[Tensor, Tensor] | None:
        """Memory for keys and values that begins with the exact ends and has room for so many tokens more; `advance`
        counts those that were written. None if the layer holds tokens of another shape than [B, H, 0, D], that given.
        """
        if not self.is_initialized:
            self.lazy_initialization(like_BHTD, like_BHTD)
        ends = [history.end_BHTD for history in self._histories]
        if any(end[:, :, :0].shape != like_BHTD.shape or end.dtype != like_BHTD.dtype for end in ends):
            return None
        keys, values = (history.room(tokens, self.window + self.block) for history in self._histories)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count so many tokens that were written to the room, and pack those that are old."""
        for history in self._histories:
            history.advance(tokens)
        self._pack_what_is_old()

    def packed(self) -> tuple[PackedHeads, PackedHeads] | None:
        """The packed keys and values, if they can be read as they lie: whole blocks of finite numbers."""
        keys, values = (history.packed for history in self._histories)
        is_whole = all(kept == self.block for kept in self._kept)
        is_finite = all(blocks.is_finite for _, blocks in (*keys.stores, *values.stores))
        return (keys, values) if is_whole and is_finite else None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys [B, H, T, D], unpacked; None before the first."""
        return self._histories[0].read(self._kept) if self._histories else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values [B, H, T, D], unpacked; None before the first."""
        return self._histories[1].read(self._kept) if self._histories else None

    @property
    def exact_tokens(self) -> int:
        """Tokens in the exact end."""
        return self._histories[0].end_BHTD.shape[-2] if self._histories else 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return sum(self._kept) + self.exact_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. A block that contains some of them stays packed, and fewer of its
        tokens are read. The exact end is then shorter than the window until new tokens come. With releases of
        transformers whose own `crop` takes a length, a number of 0 or more is the length to keep.
        """
        if tokens_to_remove >= 0 and not _CROP_REMOVES:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove (={tokens_to_remove}) must be negative or 0: minus how many to remove")
        left = max(self.exact_tokens + tokens_to_remove, 0)
        to_remove = -tokens_to_remove - (self.exact_tokens - left)
        while to_remove > 0 and self._kept:
            last = self._kept.pop()
            if last > to_remove:
                self._kept.append(last - to_remove)
            to_remove -= last
        self.changes += 1
        for history in self._histories:
            history.crop(len(self._kept), left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequences in the order of `beam_idx` [B]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, the repetitions beside each other."""
        if self._histories:
            batch = torch.arange(self._histories[0].end_BHTD.shape[0], device=self.device)
            self.batch_select_indices(batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences: their numbers, or a mask [B]."""
        if self._histories:
            batch = torch.arange(self._histories[0].end_BHTD.shape[0], device=self.device)
            self.changes += 1
            for history in self._histories:
                history.select(batch[indices.to(self.device)])

    def offload(self) -> None:
        """Refused; raises `NotImplementedError`."""
        raise NotImplementedError("a quantized cache is not offloaded: DynamicCache(offloading=True) is")

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, ranges and the exact end."""
        return sum(history.nbytes for history in self._histories)


class QuantizedCache(DynamicCache):
    """Keys and values for later forward passes, packed. Made by `foveate.quantized_cache`."""

    def __init__(self, layers: Sequence[Any]) -> None:
        Cache.__init__(self, layers=list(layers))
        self._rooms = Rooms()

    def decoder_room(self, structure: Structure, x: Tensor) -> Room | None:
        """Room for the tokens of x [B, S, width] in the op that runs all blocks of a decoder; None if it cannot read or
        write what this cache holds.
        """
        return self._rooms.room_in(self.layers, structure, x)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Each layer's keys and values, unpacked, and the size of its sliding window or None."""
        layers: list[Any] = self.layers
        for layer in layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, what is exact included."""
        return sum(_nbytes(layer) for layer in self.layers)


def _nbytes(layer: Any) -> int:
    """Bytes of any layer's cache."""
    if isinstance(layer, QuantizedLayer):
        return layer.nbytes
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    for states in ("conv_states", "recurrent_states"):
        held += getattr(layer, states, {}).values()
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


def plain_layers(config: Any) -> tuple[list[Any], list[int]]:
    """The layers that transformers' own cache would have, and which of them are plain attention."""
    layers = DynamicCache(config=config).layers
    # older releases make layers of attention for any model
    if getattr(config.get_text_config(decoder=True), "num_attention_heads", None) is None:
        return layers, []
    return layers, [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
