"""Room in a packed cache for a decoder whose blocks run in one op (`foveate.nn.decoder`).

It is the exact ends of the layers, with memory for the tokens to come, and the packed blocks as they lie. Layers that
pack (`foveate.kvcache.layers`) are known by their `exact_tokens`; layers beside them are those of transformers.

Legend: B sequences, H heads of keys and values, S tokens of a call, D channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.nn.decoder.caches import Packed, Room, grown
from foveate.nn.decoder.structure import Structure

#: Tokens of a packed block that the op can read.
_BLOCKS = (32, 64, 128, 256)
_NONE = torch.empty(0)


class Rooms:
    """The rooms of one cache. What is packed is looked up anew only after it has changed."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._packed: Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_key": (), "_packed": None}  # a copy of a cache has tensors of its own

    def room_in(self, layers: Sequence[Any], structure: Structure, x: Tensor) -> Room | None:
        """Room for the tokens of x [B, S, width]; None where the op cannot read or write what the layers hold."""
        if len(layers) != len(structure.blocks):
            return None
        keys, values, pasts, seen = [], [], [], set()
        for layer, block in zip(layers, structure.blocks, strict=True):
            if hasattr(layer, "exact_tokens"):
                n = block.numbers
                room = layer.room(x.shape[1], x.new_empty(x.shape[0], n.kv_heads, 0, n.head_size))
                if room is None:
                    return None
                pasts.append(layer.exact_tokens)
                seen.add(layer.get_seq_length())
            else:
                if (past := grown(layer, block, x)) is None:
                    return None
                room = layer.room
                pasts.append(layer.lengths[0])
                seen.add(past)
            keys.append(room[0])
            values.append(room[1])
        if len(seen) != 1:
            return None
        past = seen.pop()
        key = tuple(getattr(layer, "changes", -1) for layer in layers)
        if key != self._key:
            self._key, self._packed = key, _packed(layers, structure)
        if self._packed is None:
            return None
        packed = self._packed if self._packed.parts else None
        return Room(keys, values, past, pasts, layers, packed)


def _packed(layers: Sequence[Any], structure: Structure) -> Packed | None:
    """What is packed in the layers, without `parts` if nothing is; None where it cannot be read as it lies."""
    heads = {block.numbers.kv_heads for block in structure.blocks}
    if len(heads) != 1:
        return None
    places = torch.full((len(layers), 2, heads.pop(), 2), -1)
    parts: list[Tensor] = []
    positions, size = [0] * len(layers), 0
    for number, layer in enumerate(layers):
        if not hasattr(layer, "exact_tokens") or layer.get_seq_length() == layer.exact_tokens:
            continue
        sides = layer.packed()
        if sides is None or layer.block not in _BLOCKS or size not in (0, layer.block):
            return None
        size, positions[number] = layer.block, layer.get_seq_length() - layer.exact_tokens
        for kind, side in enumerate(sides):
            for which, blocks in side.stores:
                for at, head in enumerate(which):
                    places[number, kind, head] = torch.tensor((len(parts) // 2, at))
                parts += blocks.parts if len(blocks.parts) == 2 else (*blocks.parts, _NONE)
    return Packed(parts, places, size, positions)
