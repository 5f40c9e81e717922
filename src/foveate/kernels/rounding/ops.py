"""The ops that rounding spends its time in: the codes of a weight, one element after another.

`codes_feed(codes, w, factor, row_factor, scale, offset, gain, group_of, shares)` writes uint8 codes [2, N, K] (4-bit
codes, residuals), each error passed on to the elements that are still to come. `codes_descend(codes, w, covariance,
gradients, scale, offset, gain, group_of, shares, sweeps, least_gain)` changes the codes there are, each to the pair
that is best with all others as they are, and returns how many sweeps each block of rows took, int64.
kernels/rounding/reference.py has the meaning of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define
from foveate.kernels.rounding import reference as reference

_GRID = "Tensor scale, Tensor offset, Tensor gain, Tensor group_of, float[] shares"

define(
    f"codes_feed(Tensor(a!) codes, Tensor w, Tensor factor, Tensor? row_factor, {_GRID}) -> ()", reference.codes_feed
)
define(
    f"codes_descend(Tensor(a!) codes, Tensor w, Tensor covariance, Tensor? gradients, {_GRID}, int sweeps,"
    " float least_gain=0.0) -> Tensor",
    reference.codes_descend,
)


@torch.library.register_fake("foveate::codes_feed", lib=LIBRARY)
def _feed_fake(codes: Tensor, *_: object) -> None:
    return None


@torch.library.register_fake("foveate::codes_descend", lib=LIBRARY)
def _descend_fake(codes: Tensor, w: Tensor, covariance: Tensor, gradients: Tensor | None, *_: object) -> Tensor:
    size = reference.LONE_ROWS if gradients is None else gradients.shape[1]
    return codes.new_empty((w.shape[0] + size - 1) // size, dtype=torch.int64)
