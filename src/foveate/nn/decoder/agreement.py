"""How far two ways of computing a decoder's last hidden states may be apart, and still compute the same.

Rounding differs between the op and the blocks. An input of few bits turns a difference of rounding into one of a step,
and so on from block to block: at 2 bits the last hidden states of a real model differ by some percent then. So where
the two ways are further apart than usual, the blocks are compared with themselves, on inputs that differ by rounding.

Shapes: x, expected, found [B, S, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The relative difference of the last hidden states, up to which two ways count as the same without a further look.
USUAL = 0.03
#: How many roundings of hidden states, each of one unit of the last place, may add up between the two ways.
_ROUNDINGS = 4
#: How blocks are compared with themselves: the relative size of a rounding, and how many inputs are tried.
_ROUNDING, _TRIES = 1e-6, 4
#: How many times as far apart the two ways may be, and what is too far in any case.
_TIMES, _TOO_FAR = 3.0, 0.3


def apart(base: Any, x: Tensor, expected: Tensor, found: Tensor) -> float:
    """How far last hidden states are from those expected, over what blocks add to hidden states and what rounding in
    the dtype of x may change.
    """
    added = (expected.float() - base.norm(x).float()).norm()
    rounding = _ROUNDINGS * torch.finfo(expected.dtype).eps * expected.float().norm()
    return float((found.float() - expected.float()).norm() / (added + rounding / USUAL).clamp_min(1e-30))


def unsteadiness(base: Any, x: Tensor, expected: Tensor) -> float:
    """How far apart two ways may be, since the blocks themselves are as far on inputs that differ by rounding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(_TRIES):
        rounded = x * (1 + _ROUNDING * torch.randn(x.shape, generator=generator)).to(x.dtype)
        output = type(base).forward(base, inputs_embeds=rounded, use_cache=False)
        found.append(apart(base, x, expected, output.last_hidden_state))
    return min(_TIMES * max(found), _TOO_FAR)
