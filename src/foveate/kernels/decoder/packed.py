"""Packed positions of a decoder's caches, in plain torch: what `decoder_blocks_packed` reads.

Shapes: B sequences, N runs of `block` tokens, h heads of a pair of tensors, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.saved.reference import group_unpack


def unpacked(
    sizes: Sequence[int], packed: Sequence[Tensor], places: Tensor, block: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """For each block of a decoder with packed positions their keys and values, float32 [B, kv_heads, N * block, D].

    Args:
        sizes: of a head, for each block of the decoder.
        packed, places, block: as `decoder_blocks_packed` takes them.
    """
    found = {}
    for number, of_block in enumerate(places.tolist()):
        size = sizes[number]
        heads = [
            [_head(packed[2 * pair], packed[2 * pair + 1], place, size, block) for pair, place in row if pair >= 0]
            for row in of_block
        ]
        if heads[0]:
            found[number] = (torch.stack(heads[0], 1), torch.stack(heads[1], 1))
    return found


def _head(numbers: Tensor, ranges: Tensor, place: int, size: int, block: int) -> Tensor:
    """The positions of one head of a pair of packed tensors, float32 [B, N * block, D]."""
    if not ranges.numel():
        x_NBDK = numbers[:, :, place].float()
    else:
        runs, batch, groups = ranges.shape[:3]
        bits = numbers.shape[2] * 8 // (groups * block)
        flat = group_unpack(
            numbers.reshape(-1), ranges.reshape(-1, 2), bits, block, runs * batch * groups * block, torch.float32
        )
        x_NBDK = flat.view(runs, batch, groups // size, size, block)[:, :, place]
    return x_NBDK.permute(1, 0, 3, 2).flatten(1, 2)
