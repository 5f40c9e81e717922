"""The ops that choose the grids and the codes of a weight. Rounding spends its time in them.

`search_grids(w, importance, group, exponent, penalty6, penalty8)` returns the scale and the offset of each group,
float32 [2, N, G]; kernels/rounding/grid_search.py has the meaning. The other ops choose codes, one after another.
`error_feedback(codes, w, factor, row_factor, scale, offset, gain, group_of, level_weights, reach)` writes uint8 codes
[2, N, K] (4-bit codes, residuals). Each error is passed on to the elements that follow.
`coordinate_descent(codes, w, covariance, gradients, scale, offset, gain, group_of, level_weights, sweeps, least_gain,
reach)` changes codes that exist, each to the pair that is best with all others as they are, and returns how many sweeps
each block of rows took, int64. kernels/rounding/reference.py has the meaning of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.kernels.library import LIBRARY, define
from foveate.kernels.rounding import reference as reference
from foveate.kernels.rounding.grid_search import search_grids

_GRID = "Tensor scale, Tensor offset, Tensor gain, Tensor group_of, float[] level_weights"

define(
    "search_grids(Tensor w, Tensor importance, int group, int exponent, float penalty6, float penalty8) -> Tensor",
    search_grids,
)
define(
    f"error_feedback(Tensor(a!) codes, Tensor w, Tensor factor, Tensor? row_factor, {_GRID}, int reach=0) -> ()",
    reference.error_feedback,
)
define(
    f"coordinate_descent(Tensor(a!) codes, Tensor w, Tensor covariance, Tensor? gradients, {_GRID}, int sweeps,"
    " float least_gain=0.0, int reach=0) -> Tensor",
    reference.coordinate_descent,
)


@torch.library.register_fake("foveate::search_grids", lib=LIBRARY)
def _search_fake(w: Tensor, importance: Tensor, group: int, *_: object) -> Tensor:
    if group < 1:
        raise FoveateError(f"group (={group}) is not at least 1")
    return w.new_empty(2, w.shape[0], (w.shape[1] + group - 1) // group)


@torch.library.register_fake("foveate::error_feedback", lib=LIBRARY)
def _feed_fake(codes: Tensor, *_: object) -> None:
    return None


@torch.library.register_fake("foveate::coordinate_descent", lib=LIBRARY)
def _descend_fake(codes: Tensor, w: Tensor, covariance: Tensor, gradients: Tensor | None, *_: object) -> Tensor:
    size = reference.LONE_ROWS if gradients is None else gradients.shape[1]
    if not size:
        raise FoveateError("gradients are of no rows")
    return codes.new_empty((w.shape[0] + size - 1) // size, dtype=torch.int64)
