"""arena: one block of memory on huge pages, cut into tensors."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64


def arena(sizes: Sequence[int]) -> list[Tensor]:
    """One block of memory on huge pages, cut into uint8 tensors of the given sizes, each on a cache line.

    Weights are read once for each token, and on small pages that costs bandwidth. So planes lie in blocks like this
    one. Memory that was never written is not resident.
    """
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    total = offsets[-1]
    if total >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # private: Python's default is shared memory, which has no huge pages and which a forked process writes through
        block = mmap.mmap(-1, total + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(block, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        with suppress(OSError):  # a kernel that was built without huge pages
            # whole pages only: the end of the block must not make the rest of a huge page resident
            block.madvise(mmap.MADV_HUGEPAGE, start, total // HUGE_PAGE * HUGE_PAGE)
        whole = whole[start : start + total]
    else:
        whole = torch.empty(total, dtype=torch.uint8)
    return [whole[start : start + size] for start, size in zip(offsets, sizes, strict=False)]
