"""The ops that choose the codes of a weight, one element after another. Rounding spends its time in them.

`error_feedback(codes, w, factor, row_factor, scale, offset, gain, group_of, level_weights)` writes uint8 codes
[2, N, K] (4-bit codes, residuals). Each error is passed on to the elements that follow.
`coordinate_descent(codes, w, covariance, gradients, scale, offset, gain, group_of, level_weights, sweeps)` changes
codes that exist, each to the pair that is best with all others as they are. kernels/rounding/reference.py has the
meaning of the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define
from foveate.kernels.rounding import reference as reference

_GRID = "Tensor scale, Tensor offset, Tensor gain, Tensor group_of, float[] level_weights"

define(
    f"error_feedback(Tensor(a!) codes, Tensor w, Tensor factor, Tensor? row_factor, {_GRID}) -> ()",
    reference.error_feedback,
)
define(
    f"coordinate_descent(Tensor(a!) codes, Tensor w, Tensor covariance, Tensor? gradients, {_GRID}, int sweeps) -> ()",
    reference.coordinate_descent,
)


def _in_place_fake(codes: Tensor, *_: object) -> None:
    return None


for _name in ("error_feedback", "coordinate_descent"):
    torch.library.register_fake(f"foveate::{_name}", _in_place_fake, lib=LIBRARY)
