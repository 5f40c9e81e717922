"""The caches of transformers as the op `decoder_blocks` writes them: exact keys and values with room for more.

A static cache has that room. A dynamic one makes new tensors at every token, and copies all that it holds. Here its
layers become `GrowingLayer`s, which keep more memory than they show, and double it when it is full.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.nn.decoder.structure import Structure

_LEAST_ROOM = 64


@functools.cache
def growing_layer() -> type:
    """The class `GrowingLayer`, a `transformers.DynamicLayer`; made when first asked for, since transformers is an extra."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]
        """A dynamic layer of a cache whose keys and values are the beginning of larger tensors.

        What is put in by others replaces those tensors. So a view that somebody holds is never written to: room beyond
        what was put in is used once.

        Attributes:
            room: the tensors, [B, heads, T, D] each; None before anything was put in.
            length: how many of their positions are shown.
        """

        room: list[Tensor | None]
        length: int

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
            held = self.__dict__.get("room", (None, None))[which]
            if held is None or self.length >= held.shape[-2]:
                return held
            return held[..., : self.length, :]

        def _put(self, which: int, value: Tensor | None) -> None:
            room = self.__dict__.setdefault("room", [None, None])
            other = room[1 - which]
            if other is not None and other.shape[-2] > self.length:
                room[1 - which] = other[..., : self.length, :]  # both are as long as what is shown
            room[which] = value
            self.length = 0 if value is None or value.dim() < 2 else value.shape[-2]

        def __reduce_ex__(self, protocol: Any) -> Any:
            state = {k: v for k, v in self.__dict__.items() if k not in ("room", "length")}
            return _as_dynamic, ({**state, "keys": self.keys, "values": self.values},)

    return GrowingLayer


def _as_dynamic(state: dict[str, Any]) -> Any:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.__dict__.update(state)
    return layer


class Room:
    """The keys and values of all blocks, with room for the tokens of one call.

    Attributes:
        keys, values: for each block [B, kv_heads, T, D].
        past: how many positions are cached.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], past: int, layers: Sequence[Any]) -> None:
        self.keys, self.values, self.past = keys, values, past
        self._layers = layers

    def advance(self, count: int) -> None:
        """Say that so many positions were written."""
        layers = self._layers
        if not layers:
            return
        if isinstance(layers[0], growing_layer()):
            for layer in layers:
                layer.length += count
        else:
            torch._foreach_add_([layer.cumulative_length for layer in layers], count)


def room_in(cache: Any, structure: Structure, x: Tensor) -> Room | None:
    """The room for the tokens of x [B, S, H] in a cache, or in memory of its own if there is no cache.

    Returns:
        None if the cache is not one that the op can write.
    """
    if cache is None:
        return scratch(structure, x)
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or type(cache).__module__ != "transformers.cache_utils" or cache.__dict__.get("offloading"):
        return None
    from transformers.cache_utils import DynamicLayer, StaticLayer

    blocks = structure.blocks
    growing = growing_layer()
    if len(layers) < len(blocks) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers += [DynamicLayer() for _ in range(len(blocks) - len(layers))]
    if len(layers) != len(blocks):
        return None
    kinds = {type(layer) for layer in layers}
    if kinds == {StaticLayer}:
        return _static(layers, structure, x)
    if kinds <= {DynamicLayer, growing}:
        return _growing(layers, structure, x)
    return None


def scratch(structure: Structure, x: Tensor, *, shared: bool = True) -> Room:
    """Room for one call, which nobody reads afterwards; if not `shared`, each block has memory of its own."""
    made: dict[tuple[int, ...], Tensor] = {}
    keys = []
    for number, block in enumerate(structure.blocks):
        heads, size = block.numbers.kv_heads, block.numbers.head_size
        place = (heads, size) if shared else (heads, size, number)
        if place not in made:
            made[place] = x.new_empty(2, x.shape[0], heads, x.shape[1], size)
        keys.append(made[place])
    return Room([both[0] for both in keys], [both[1] for both in keys], 0, ())


def _static(layers: Sequence[Any], structure: Structure, x: Tensor) -> Room | None:
    for layer, block in zip(layers, structure.blocks, strict=True):
        if not layer.is_initialized:
            states = x.new_empty(x.shape[0], block.numbers.kv_heads, 0, block.numbers.head_size)
            layer.lazy_initialization(states, states)
    past = int(layers[0].cumulative_length)
    if past + x.shape[1] > layers[0].max_cache_len or layers[0].keys.shape[0] != x.shape[0]:
        return None
    return Room([layer.keys for layer in layers], [layer.values for layer in layers], past, layers)


def _growing(layers: Sequence[Any], structure: Structure, x: Tensor) -> Room | None:
    growing = growing_layer()
    batch, length = x.shape[:2]
    for layer in layers:
        if type(layer) is not growing:
            held = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
            layer.__class__ = growing
            layer.room, layer.length = [None, None], 0
            if layer.is_initialized and held[0] is not None and held[0].numel():
                layer.keys, layer.values = held
    past = layers[0].length
    keys, values = [], []
    for layer, block in zip(layers, structure.blocks, strict=True):
        if layer.length != past:
            return None
        room = layer.room
        if room[0] is None or room[0].shape[-2] < past + length:
            count = max(_LEAST_ROOM, 2 * past, past + length)
            shape = (batch, block.numbers.kv_heads, count, block.numbers.head_size)
            shown = layer.keys, layer.values
            room = [x.new_empty(shape), x.new_empty(shape)]
            if past:
                if shown[0].shape != (*shape[:2], past, shape[3]) or shown[0].dtype != x.dtype:
                    return None
                for new, old in zip(room, shown, strict=True):
                    new[..., :past, :] = old
            layer.device, layer.is_initialized = x.device, True
            layer.room, layer.length = room, past
        keys.append(room[0])
        values.append(room[1])
    if keys[0].shape[0] != batch:
        return None
    return Room(keys, values, past, layers)
