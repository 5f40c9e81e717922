"""The ops of a decoder's blocks: `decoder_handle`, and `decoder_blocks` with its kin for packed and for paged caches.

A model of thirty small layers spends more time between its products than in them. `decoder_blocks` computes all blocks
of a decoder in one call: norms, products with weights on planes, rotary positions, attention over caches, exact or
packed, gates and residuals. `reference.py` beside this file has the meaning.

Its products are those of `plane_linear_by_handle`, to the bit. What lies between them is float32, whatever the dtype
of x, and rounds otherwise than torch's own functions, by a few units of the last place. A query's attention depends
neither on the other rows, nor on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.decoder import reference
from foveate.kernels.library import LIBRARY, define

define(
    "decoder_handle(Tensor[] groups, Tensor[] biases, Tensor[] norms, Tensor[] routers, Tensor[] experts,"
    " int[] numbers, float[] constants) -> Tensor",
    reference.decoder_handle,
)
define(
    "decoder_blocks(Tensor x, Tensor handle, Tensor book, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cosine,"
    " Tensor sine, Tensor? first, int[] past) -> Tensor",
    reference.decoder_blocks,
)
define(
    "decoder_blocks_packed(Tensor x, Tensor handle, Tensor book, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cosine,"
    " Tensor sine, Tensor? first, int[] past, Tensor[] packed, Tensor places, int block) -> Tensor",
    reference.decoder_blocks_packed,
)

define(
    "decoder_blocks_paged(Tensor x, Tensor handle, Tensor book, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cosine,"
    " Tensor sine, Tensor lengths, Tensor[] ends, Tensor[] reads, Tensor[] writes) -> Tensor",
    reference.decoder_blocks_paged,
)


def _blocks_fake(
    x: Tensor, handle: Tensor, book: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *_: Any
) -> Tensor:
    return torch.empty_like(x)


for _name in ("decoder_blocks", "decoder_blocks_packed", "decoder_blocks_paged"):
    torch.library.register_fake(f"foveate::{_name}", _blocks_fake, lib=LIBRARY)
