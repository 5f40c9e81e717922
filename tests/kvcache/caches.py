"""Packed caches of tiny models, and the tokens and states that they are filled with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.kvcache.layers import QuantizedLayer
from tiny import generator, llama_config

WINDOW, BLOCK = 8, 32
LENGTH = {"max_position_embeddings": 512}


def states(tokens: int, batch: int = 2, heads: int = 2, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    keys = torch.randn(batch, heads, tokens, width, generator=g) + 3 * torch.randn(width, generator=g)
    return keys, torch.randn(batch, heads, tokens, width, generator=g)


def layer(level: int = 4, window: int = WINDOW, block: int = BLOCK) -> QuantizedLayer:
    return QuantizedLayer(level, level, window, block)


def read(of: Any) -> tuple[Tensor, Tensor]:
    assert of.keys is not None
    assert of.values is not None
    return of.keys, of.values


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cache(level: int | fv.PrecisionMap = 4, **changes: Any) -> Any:
    return fv.quantized_cache(llama_config(**LENGTH), level, window=WINDOW, **changes)


def ids(batch: int = 2, length: int = 90, seed: int = 3) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=generator(seed))
