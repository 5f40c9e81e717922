"""Packed blocks of keys or values: how a cache stores tokens that are no longer recent.

    x [B, H, T, D]  ->  blocks of `block` tokens, each transposed to [B, h, D, block]: one group is one channel's tokens

Keys have channels that are large at every token (rotary embeddings turn the rest), so a step and a least value for each
channel of each block fit them, while a step for each token would be set by the outlier: KIVI, arXiv:2402.02750.
Values have no such channels, but were measured as good or better with the same layout (docs/decisions.md). Rounding is
to nearest: a cache is read many times with the same error, and unbiased rounding would only make that error larger.

A block is written once, and never unpacked and packed again. Appending adds blocks. Removing tokens from within a block
leaves the block as it is, and fewer of its tokens are read.

Legend: B sequences, H heads of keys and values (h of them at one level), T tokens, D channels a head, N blocks,
K tokens a block, C bytes of codes, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from foveate.errors import LevelError
from foveate.formats.levels import CACHE_LEVELS, check_cache_level
from foveate.kernels.backends.table import ensure_loaded

#: Values unpacked at a time: few enough to stay in the processor's cache until they are copied.
_CHUNK = 1 << 18
_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


def is_exact(level: int, dtype: torch.dtype) -> bool:
    """Whether a level stores numbers of a dtype unchanged: 32 always does, 16 does for dtypes of 16 bits."""
    return level >= 8 * min(dtype.itemsize, 4)


def pack(x_NBHDK: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N, B, C], ranges bfloat16 [N, B, G, 2]) of blocks, rounded to nearest; one group is K numbers."""
    ensure_loaded()
    blocks, batch, heads, width, group = x_NBHDK.shape
    flat = x_NBHDK if x_NBHDK.dtype in _PACKABLE else x_NBHDK.float()
    codes, ranges = torch.ops.foveate.group_pack(flat.contiguous(), level, group, None)
    groups = heads * width
    return codes.view(blocks, batch, groups * group * level // 8), ranges.view(blocks, batch, groups, 2)


def unpack(codes_NBC: Tensor, ranges_NBG2: Tensor, level: int, group: int, dtype: torch.dtype) -> Tensor:
    """The numbers of packed blocks, [N * B * h * D * K]."""
    count = ranges_NBG2.numel() // 2 * group
    known = dtype if dtype in _PACKABLE else torch.float32
    flat: Tensor = torch.ops.foveate.group_unpack(
        codes_NBC.reshape(-1), ranges_NBG2.reshape(-1, 2), level, group, count, known
    )
    return flat


class Blocks:
    """Blocks of some heads at one level, written once.

    Attributes:
        level: 2, 4, 8, 16 or 32.
        block: tokens a block, K.
        parts: what is stored, blocks first and sequences second: codes [N, B, C] and ranges [N, B, G, 2], or, where the
            level is exact, the numbers themselves [N, B, h, D, K].
        unpackable: the numbers [B, h, D, K] of blocks with a NaN or an Inf, which have no range.
        is_finite: whether no block has a NaN or an Inf.
    """

    def __init__(self, level: int, block: int) -> None:
        self.level, self.block = level, block
        self.parts: tuple[Tensor, ...] = ()
        self.unpackable: dict[int, Tensor] = {}
        self.is_finite = True
        self._shape = (0, 0)
        self._dtype = torch.float32

    def append(self, x_BHTD: Tensor) -> None:
        """Store more tokens, a multiple of `block` of them."""
        _, heads, _, width = x_BHTD.shape
        x_NBHDK = x_BHTD.unflatten(2, (-1, self.block)).permute(2, 0, 1, 4, 3)
        self._shape, self._dtype = (heads, width), x_BHTD.dtype
        new: tuple[Tensor, ...]
        if is_exact(self.level, x_BHTD.dtype):
            new = (x_NBHDK.contiguous(),)
            self.is_finite &= bool(torch.isfinite(new[0]).all())
        else:
            new = pack(x_NBHDK, self.level)
            for block in new[1][..., 0].isnan().flatten(1).any(1).nonzero().flatten().tolist():
                self.unpackable[len(self) + block] = x_NBHDK[block].contiguous()
                self.is_finite = False
        # every token unpacks all blocks, so copying the codes once a block costs little beside it
        self.parts = tuple(torch.cat(both) for both in zip(self.parts, new, strict=True)) if self.parts else new

    def __len__(self) -> int:
        return len(self.parts[0]) if self.parts else 0

    def read(self, first: int, last: int) -> Tensor:
        """The tokens of blocks `first` to `last`, [B, h, N, K, D]."""
        batch = self.parts[0].shape[1]
        if len(self.parts) == 1:
            x_NBHDK = self.parts[0][first:last]
        else:
            codes, ranges = (part[first:last] for part in self.parts)
            flat = unpack(codes, ranges, self.level, self.block, self._dtype)
            x_NBHDK = flat.view(last - first, batch, *self._shape, self.block)
            for block, exact in self.unpackable.items():
                if first <= block < last:
                    x_NBHDK[block - first] = exact
        return x_NBHDK.permute(1, 2, 0, 4, 3)

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order, as often as they are named."""
        self.parts = tuple(part.index_select(1, index_B.to(part.device)) for part in self.parts)
        self.unpackable = {n: x.index_select(0, index_B.to(x.device)) for n, x in self.unpackable.items()}

    def truncate(self, blocks: int) -> None:
        """Keep the first blocks."""
        if blocks >= len(self):
            return
        self.parts = tuple(part[:blocks].clone() for part in self.parts) if blocks else ()
        self.unpackable = {n: x for n, x in self.unpackable.items() if n < blocks}

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.numel() * t.element_size() for t in (*self.parts, *self.unpackable.values()))


class PackedHeads:
    """The packed tokens of a layer's keys, or of its values; each head at its own level.

    Args:
        levels: one level for all heads, or one for each.
        block: tokens a block.

    Raises:
        LevelError: a level is none of a cache's.
    """

    def __init__(self, levels: int | Sequence[int], block: int) -> None:
        self.levels: int | tuple[int, ...] = levels if isinstance(levels, int) else tuple(levels)
        for level in {levels} if isinstance(levels, int) else set(levels):
            check_cache_level(level)
        self.block = block
        self.stores: list[tuple[list[int], Blocks]] = []

    def append(self, x_BHTD: Tensor) -> None:
        """Store more tokens, a multiple of `block` of them; raises `LevelError` if there are not as many levels as
        heads.
        """
        heads = x_BHTD.shape[1]
        if not self.stores:
            levels = (self.levels,) * heads if isinstance(self.levels, int) else self.levels
            if len(levels) != heads:
                raise LevelError(f"the cache has levels for {len(levels)} heads, and the layer has {heads}")
            present = [level for level in CACHE_LEVELS if level in levels]
            self.stores = [
                ([h for h in range(heads) if levels[h] == level], Blocks(level, self.block)) for level in present
            ]
        for which, blocks in self.stores:
            blocks.append(x_BHTD if len(which) == heads else x_BHTD[:, which])

    def fill(self, out_BHTD: Tensor, kept: Sequence[int]) -> None:
        """Write all packed tokens to the front of `out_BHTD`; `kept` says how many tokens of each block there are."""
        batch, _, _, width = out_BHTD.shape
        for which, blocks in self.stores:
            most = max(1, _CHUNK // max(batch * len(which) * width * self.block, 1))
            runs = _runs(which)
            for first, last, start, tokens in _segments(kept, self.block, most):
                x_BHND = blocks.read(first, last)
                place = out_BHTD[:, :, start : start + tokens]
                for head, count, at in runs:
                    part = x_BHND[:, at : at + count]
                    target = place[:, head : head + count]
                    if tokens % self.block:
                        target.copy_(part[:, :, 0, :tokens])
                    else:
                        target.unflatten(2, (last - first, self.block)).copy_(part)

    def select(self, index_B: Tensor) -> None:
        """Keep these sequences, in this order, as often as they are named."""
        for _, blocks in self.stores:
            blocks.select(index_B)

    def truncate(self, blocks: int) -> None:
        """Keep the first blocks."""
        for _, store in self.stores:
            store.truncate(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(blocks.nbytes for _, blocks in self.stores)


def _runs(heads: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of consecutive numbers among ascending heads: (first head, how many, its place among `heads`)."""
    grouped = groupby(enumerate(heads), key=lambda pair: pair[1] - pair[0])
    runs = [list(run) for _, run in grouped]
    return [(run[0][1], len(run), run[0][0]) for run in runs]


def _segments(kept: Sequence[int], block: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Blocks to read together: (first, last, first token to write, tokens). A shortened block is read alone."""
    start = first = 0
    while first < len(kept):
        last = first + 1
        if kept[first] == block:
            while last < len(kept) and last - first < most and kept[last] == block:
                last += 1
        tokens = kept[first] if last == first + 1 else (last - first) * block
        yield first, last, start, tokens
        start, first = start + tokens, last
