"""What an attention mask of transformers hides: padding on the left of each sequence, or something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class OtherMask(Exception):
    """A mask that is not causal with padding on the left."""


def first_positions(mask: Any, past: int, length: int, windows: Mapping[str | None, int]) -> Tensor | None:
    """The first position of each sequence that is no padding.

    Args:
        mask: None; or [B, T], 1 where there is no padding; or [B or 1, 1, S, T], what each query sees: True, or 0.0 to
            be added to scores; or such masks by the kinds of blocks.
        past, length: positions that are cached, and positions of this call.
        windows: how many positions blocks of each kind see, 0 for all; the kind is None where all are alike.

    Returns:
        int64 [B]; None where there is no padding.

    Raises:
        OtherMask: the mask hides something else.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        if not set(windows) <= set(mask):
            raise OtherMask
        found = [_of_queries(mask[kind], past, length, windows[kind]) for kind in windows if mask[kind] is not None]
        if len({None if first is None else tuple(first.tolist()) for first in found}) > 1:
            raise OtherMask
        return found[0] if found else None
    if not isinstance(mask, Tensor):
        raise OtherMask
    if mask.dim() == 2:
        return _of_tokens(mask, past + length)
    if len(set(windows.values())) != 1:
        raise OtherMask
    return _of_queries(mask, past, length, next(iter(windows.values())))


def _of_tokens(mask: Tensor, total: int) -> Tensor | None:
    if mask.is_floating_point() or mask.shape[1] != total:
        raise OtherMask
    kept = mask if mask.dtype == torch.bool else mask == 1
    if bool(kept.all()):
        return None
    first = total - kept.sum(1)
    if not torch.equal(kept, torch.arange(total) >= first[:, None]):
        raise OtherMask
    return first


def _of_queries(mask: Any, past: int, length: int, window: int) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != length:
        raise OtherMask
    total = mask.shape[3]
    if total < past + length:
        raise OtherMask
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, S, T]
    cached, position = torch.arange(total), torch.arange(past, past + length)[:, None]
    expected = cached <= position
    if window:
        expected = expected & (cached > position - window)
    if torch.equal(seen, expected.expand_as(seen)):
        return None
    if window:  # the last query need not see the first position
        raise OtherMask
    first = seen[:, -1].int().argmax(-1)
    if not torch.equal(seen, expected & (cached >= first[:, None, None])):
        raise OtherMask
    return first
