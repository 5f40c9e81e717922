"""Random calls of the ops on a decoder's blocks. `fuzz.op_calls` says what wrong calls are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.decoder.numbers import Numbers
from fuzz.arguments import Arguments
from kernels.decoder_cases import EXACT, Decoder, decoder, packed_of


class DecoderArguments(Arguments):
    """Arguments of `decoder_handle`, and of `decoder_blocks` with exact, packed and paged caches."""

    def decoder(self) -> Decoder:
        """A small decoder, of one MLP or of experts."""
        kv_heads = self.one((1, 2))
        numbers = Numbers(
            heads=kv_heads * self.one((1, 3)),
            kv_heads=kv_heads,
            head_size=self.one((4, 16, 40)),
            rotary_size=4,
            rotary_table=0,
            window=self.one((0, 0, 3)),
            whole_norms=self.one((0, 1)),
            activation=self.one((0, 1, 2, 3)),
        )
        if self.chance(0.3):
            numbers = replace(numbers, experts=3, top_k=self.one((1, 2)))
        kinds = {
            "joined": self.chance(0.3),
            "biases": self.chance(0.3),
            "norms": (1, *[self.one((0, 2)) for _ in range(5)]),
        }
        level = self.one((4, 8, 8, 16, 32))
        return decoder(self.one(range(1000)), numbers, inner=self.one((5, 40)), blocks=1, level=level, **kinds)

    def handle_arguments(self) -> list[Any]:
        """Of `decoder_handle`."""
        return list(self.decoder().made_of)

    def blocks_arguments(self) -> list[Any]:
        """Of `decoder_blocks`."""
        return self._blocks(self.decoder(), self.one((0, 0, 2, 260)), 0)

    def packed_arguments(self) -> list[Any]:
        """Of `decoder_blocks_packed`."""
        d, runs, block = self.decoder(), self.one((1, 3)), self.one((32, 64, 256))
        given = self._blocks(d, self.one((0, 2)), runs * block)
        bits = self.one(((2,), (4, 8), (16, EXACT)))
        parts, places = packed_of(d, given[0].shape[0], runs, block, bits, self.one(range(1000)))
        return [*given, [self.random_of(t) if self.chance(0.1) else t for t in parts], places, block]

    def _blocks(self, d: Decoder, past: int, before: int) -> list[Any]:
        """Of `decoder_blocks`, where `before` positions lie elsewhere."""
        batch, length = self.one((1, 2)), self.one((0, 1, 3, 9))
        dtype = self.one((torch.float32, torch.bfloat16, torch.float16))
        keys, values = ([self.random_of(t) for t in part] for part in d.caches(batch, past + length + 1, dtype))
        first = torch.randint(0, 3, (batch,), generator=self.g) if self.chance(0.3) else None
        turned = d.angles(torch.arange(before + past, before + past + length)[None])
        x = torch.randn(batch, length, d.width, generator=self.g).to(self.one((torch.float32, torch.bfloat16)))
        return [x, self.exchanged(d), d.book, keys, values, *turned, first, [past]]

    def paged_arguments(self) -> list[Any]:
        """Of `decoder_blocks_paged`."""
        d = self.decoder()
        sizes = [(self.one((0, 1, 4)), self.one((0, 2, 260))) for _ in range(self.one((1, 2)))]
        lengths = torch.tensor([new for new, _ in sizes])
        ends = torch.tensor([0, *[new + cached for new, cached in sizes]]).cumsum(0)
        reads = torch.randperm(int(ends[-1]) + 2, generator=self.g)[: int(ends[-1])]
        writes = torch.cat([reads[int(end) - new : int(end)] for end, (new, _) in zip(ends[1:], sizes, strict=True)])
        rows = int(lengths.sum())
        caches = [
            torch.randn(len(reads) + 2, d.numbers.kv_heads, d.numbers.head_size, generator=self.g) for _ in range(2)
        ]
        x = torch.randn(1, rows, d.width, generator=self.g)
        turned = d.angles(torch.arange(rows)[None])
        return [x, self.exchanged(d), d.book, caches[:1], caches[1:], *turned, lengths, [ends], [reads], [writes]]

    def exchanged(self, d: Decoder) -> Tensor:
        """The handle of a decoder, of which a tensor may have been changed since it was made."""
        for _ in range(self.one((0, 0, 1))):
            self.exchange(self.one([t for t in d.tensors if t.numel()]), "weight")
        return d.handle

    def exchange(self, t: Tensor, kind: str) -> None:
        """Change a tensor that a handle holds."""
        raise NotImplementedError
