"""Caches as the op `decoder_blocks` writes them: exact keys and values with room for more, after packed ones if any.

A static cache has that room. A dynamic one makes new tensors at every token, and copies all that it holds. Here its
layers become `GrowingLayer`s, which keep more memory than they show, and double it when it is full.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.decoder.numbers import ROWS_AT_ONCE
from foveate.nn.decoder.structure import Block, Structure

_LEAST_ROOM = 64


@functools.cache
def growing(kind: type) -> type:
    """The class of layers of a cache that grow in place.

    Args:
        kind: `DynamicLayer` or `DynamicSlidingWindowLayer` of transformers, which is an extra: the class is made when
            it is first asked for.
    """

    class GrowingLayer(kind):  # type: ignore[misc]
        """A dynamic layer of a cache whose keys and values are a part of larger tensors.

        What is put in by others replaces those tensors. So a view that somebody holds is never written to: room beyond
        what was put in is used once.

        Attributes:
            room: the tensors, [B, heads, T, D] each; None before anything was put in.
            lengths: how many positions of each are in use; of those a sliding window shows the last.
            capacity: the sequences and positions that both have room for; zeros where that is not known.
        """

        room: list[Tensor | None]
        lengths: list[int]
        capacity: tuple[int, int]

        @property
        def keys(self) -> Tensor | None:
            return self._shown(0)

        @keys.setter
        def keys(self, value: Tensor | None) -> None:
            self._put(0, value)

        @property
        def values(self) -> Tensor | None:
            return self._shown(1)

        @values.setter
        def values(self, value: Tensor | None) -> None:
            self._put(1, value)

        def _shown(self, which: int) -> Tensor | None:
            held: Tensor | None = self.__dict__.get("room", (None, None))[which]
            if held is None or held.dim() < 2:
                return held
            end = self.lengths[which]
            return held[..., _dropped(self, end) : end, :]

        def _put(self, which: int, value: Tensor | None) -> None:
            self.__dict__.setdefault("room", [None, None])[which] = value
            self.__dict__["capacity"] = (0, 0)  # not known
            length = 0 if value is None or value.dim() < 2 else value.shape[-2]
            self.__dict__.setdefault("lengths", [0, 0])[which] = length

        def __reduce_ex__(self, protocol: Any) -> Any:
            own = ("room", "lengths", "capacity")
            state = {name: value for name, value in self.__dict__.items() if name not in own}
            return _plain, (kind, {**state, "keys": self.keys, "values": self.values})

    return GrowingLayer


def _dropped(layer: Any, length: int) -> int:
    """How many of the first `length` positions a layer does not show any more."""
    window = getattr(layer, "sliding_window", None)
    return max(0, length - window + 1) if window else 0


def _plain(kind: Any, state: dict[str, Any]) -> Any:
    layer = kind.__new__(kind)
    layer.__dict__.update(state)
    return layer


@dataclass(frozen=True, eq=False)
class Packed:
    """Older positions that lie packed before the keys and values of a `Room`, as `decoder_blocks_packed` takes them.

    Attributes:
        parts, places, block: its arguments.
        positions: for each block of the decoder how many are packed.
    """

    parts: list[Tensor]
    places: Tensor
    block: int
    positions: Sequence[int]


class Room:
    """The keys and values of all blocks, with room for the tokens of one call.

    Attributes:
        keys, values: for each block [B, kv_heads, T, D].
        past: how many positions were seen before.
        pasts: for each block how many of them its tensors hold.
        packed: those before them; None if there are none.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        past: int,
        pasts: Sequence[int],
        layers: Sequence[Any] = (),
        packed: Packed | None = None,
    ) -> None:
        self.keys, self.values, self.past, self.pasts, self.packed = keys, values, past, pasts, packed
        self._layers = layers

    @property
    def has_all(self) -> bool:
        """Whether every block has all positions that were seen."""
        packed = [0] * len(self.pasts) if self.packed is None else self.packed.positions
        return all(before + past == self.past for before, past in zip(packed, self.pasts, strict=True))

    def advance(self, count: int) -> None:
        """Say that so many positions were written."""
        static = []
        for layer in self._layers:
            if "capacity" in layer.__dict__:
                keys, values = layer.lengths
                layer.lengths = [keys + count, values + count]
                if layer.is_sliding:
                    layer.cumulative_length += count
            elif hasattr(layer, "advance"):
                layer.advance(count)
            else:
                static.append(layer.cumulative_length)
                if layer.is_sliding:
                    layer.cumulative_length_int += count
        if static:
            torch._foreach_add_(static, count)


def room_in(cache: Any, structure: Structure, x: Tensor) -> Room | None:
    """The room for the tokens of x [B, S, H] in a cache, or in memory of its own if there is no cache.

    Returns:
        None if the cache is not one that the op can write.
    """
    if cache is None:
        return scratch(structure, x, shared=x.shape[0] * x.shape[1] <= ROWS_AT_ONCE)
    if hasattr(cache, "decoder_room"):  # a cache of ours, which may be packed
        offered: Room | None = cache.decoder_room(structure, x)
        return offered
    layers = getattr(cache, "layers", None)
    known = type(cache).__module__ == "transformers.cache_utils" and not cache.__dict__.get("offloading")
    if not isinstance(layers, list) or not known:
        return None
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

    count = len(structure.blocks)
    if len(layers) < count and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers += [DynamicLayer() for _ in range(count - len(layers))]
    if len(layers) != count:
        return None
    kinds = {type(layer) for layer in layers}
    if kinds <= {StaticLayer, StaticSlidingWindowLayer}:
        return _static(layers, structure, x)
    dynamic = (DynamicLayer, DynamicSlidingWindowLayer)
    if kinds <= {*dynamic, *map(growing, dynamic)}:
        return _growing(layers, structure, x)
    return None


def scratch(structure: Structure, x: Tensor, *, shared: bool = True) -> Room:
    """Room for one call, which nobody reads afterwards; if not `shared`, each block has memory of its own. Of more rows
    than the op takes at once, a block reads what it wrote of the rows before.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    keys = []
    for number, block in enumerate(structure.blocks):
        heads, size = block.numbers.kv_heads, block.numbers.head_size
        place = (heads, size) if shared else (heads, size, number)
        if place not in made:
            made[place] = x.new_empty(2, x.shape[0], heads, x.shape[1], size)
        keys.append(made[place])
    return Room([both[0] for both in keys], [both[1] for both in keys], 0, [0] * len(keys))


def _static(layers: Sequence[Any], structure: Structure, x: Tensor) -> Room | None:
    if not hasattr(layers[0], "cumulative_length"):  # transformers 5.0 looks for it in the keys
        return None
    for layer, block in zip(layers, structure.blocks, strict=True):
        if not layer.is_initialized:
            states = x.new_empty(x.shape[0], block.numbers.kv_heads, 0, block.numbers.head_size)
            layer.lazy_initialization(states, states)
    past, length = int(layers[0].cumulative_length), x.shape[1]
    if any(past + length > layer.max_cache_len or layer.keys.shape[0] != x.shape[0] for layer in layers):
        return None  # a window that is full rolls
    if any(layer.is_sliding and layer.cumulative_length_int != past for layer in layers):
        return None
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    return Room(keys, values, past, [past] * len(layers), layers)


def _growing(layers: Sequence[Any], structure: Structure, x: Tensor) -> Room | None:
    found = [grown(layer, block, x) for layer, block in zip(layers, structure.blocks, strict=True)]
    if found[0] is None or set(found) != {found[0]}:
        return None
    pasts = [layer.lengths[0] for layer in layers]
    return Room([layer.room[0] for layer in layers], [layer.room[1] for layer in layers], found[0], pasts, layers)


def grown(layer: Any, block: Block, x: Tensor) -> int | None:
    """Make room in a dynamic layer of a cache for the tokens of x [B, S, H].

    Returns:
        How many positions it has seen; None if it cannot have the room.
    """
    batch, length = x.shape[:2]
    if "capacity" not in layer.__dict__:
        held = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
        kind: Any = type(layer)
        layer.__class__ = growing(kind)
        layer.room, layer.lengths, layer.capacity = [None, None], [0, 0], (0, 0)
        if layer.is_initialized and held[0] is not None and held[0].numel():
            layer.keys, layer.values = held
    sequences, positions = layer.capacity
    if sequences != batch or positions < layer.lengths[0] + length:
        if not _has_room(layer, length) and not _grow(
            layer, (batch, block.numbers.kv_heads, length, block.numbers.head_size), x
        ):
            return None
        if any(held.shape[0] != batch for held in layer.room):
            return None
        layer.capacity = (batch, min(held.shape[2] for held in layer.room))
    if getattr(layer, "record_past", False):  # later releases than 5.0
        return None
    seen: int = layer.cumulative_length if layer.is_sliding else layer.lengths[0]
    return seen


def _has_room(layer: Any, length: int) -> bool:
    """Whether the tensors of a layer have room for so many more positions."""
    end = layer.lengths[0] + length
    return all(t is not None and t.dim() == 4 and t.shape[2] >= end for t in layer.room)


def _grow(layer: Any, shape: tuple[int, int, int, int], x: Tensor) -> bool:
    """Make room in a layer for keys and values of a shape beyond those that it shows; False if they do not fit them."""
    batch, heads, length, size = shape
    shown = layer.keys, layer.values
    past = 0 if shown[0] is None or shown[0].dim() < 2 else shown[0].shape[-2]
    if past and (shown[0].shape != (batch, heads, past, size) or shown[0].dtype != x.dtype):
        return False
    count = max(_LEAST_ROOM, 2 * past, past + length)
    room = [x.new_empty(batch, heads, count, size) for _ in range(2)]
    if past:
        for new, old in zip(room, shown, strict=True):
            new[..., :past, :] = old
    if not layer.is_initialized:
        layer.lazy_initialization(x.new_empty(0), x.new_empty(0))
    layer.room, layer.lengths = room, [past, past]
    return True
