"""The paged caches of transformers' continuous batching, as the op `decoder_blocks_paged` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Arguments that continuous batching gives a decoder beside its tokens and their positions.
ARGUMENTS = frozenset(
    (
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "write_index",
        "read_index",
        "logits_indices",
        "logits_processor_args",
        "block_table",
        "is_causal",
    )
)


@dataclass(frozen=True, eq=False)
class Pages:
    """The pages of one call.

    Attributes:
        lengths: int64, the rows of each sequence.
        keys, values: for each block [places, kv_heads, D].
        ends, reads, writes: for each block, as `decoder_blocks_paged` takes them.
    """

    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    ends: list[Tensor]
    reads: list[Tensor]
    writes: list[Tensor]


def is_paged(cache: Any) -> bool:
    """Whether a cache is one of continuous batching."""
    return type(cache).__module__ == "transformers.generation.continuous_batching.cache"


def pages_of(cache: Any, given: Mapping[str, Any], blocks: int, rows: int) -> Pages | None:
    """The pages of a call; None if its cache is of another kind than the op knows (a sliding window, a block table).

    Args:
        cache: a `PagedAttentionCache`.
        given: the arguments of the call.
        blocks: how many blocks the decoder has.
        rows: how many tokens the call has.
    """
    starts = given.get("cu_seq_lens_q")
    if not isinstance(starts, Tensor) or given.get("block_table") is not None or int(starts[-1]) != rows:
        return None
    starts = starts.long()
    lists: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    made = Pages(starts.diff(), [], [], [], [], [])
    try:
        for number in range(blocks):
            allocator = cache.layer_to_allocator[number]
            if allocator.layer_type != "full_attention":
                return None
            if allocator.index not in lists:
                reads, writes = given["read_index"][allocator.index], given["write_index"][allocator.index]
                ends = given["cu_seq_lens_k"][allocator.layer_type]
                if not reads.numel():  # nothing was cached before: what is read is what is written
                    reads, ends = writes, starts
                lists[allocator.index] = ends.long().contiguous(), reads.long().contiguous(), writes.long().contiguous()
            keys, values = allocator._kv_token_views[number]
            made.keys.append(keys)
            made.values.append(values)
            for kept, own in zip((made.ends, made.reads, made.writes), lists[allocator.index], strict=True):
                kept.append(own)
    except (AttributeError, KeyError, IndexError, TypeError):  # another release of transformers
        return None
    return made
