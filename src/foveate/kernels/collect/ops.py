"""The ops that collect statistics: sums over rows, what rounding inputs changes, squared gradients of samples.

- `row_sums(x)`: float32 [T, K] -> the sum of squares of each column, float64 [K], and the sum, the least and the
  greatest of all values, float64 [3], in one read.
- `input_changes(x, toward)`: float32 [T, K] each -> float64 [2, T], what rounding x at input levels 4 and 8 changes in
  the direction `toward`.
- `add_squared_gradients(total, x, g)`: adds (g_b^T x_b)^2 of each sample b to float32 [N, K] in place.

kernels/collect/reference.py has the meaning of each. None is differentiable. A sum over rows is made of sums over 64
rows each, which are added in order, so results depend neither on threads nor on the instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.collect import reference as reference
from foveate.kernels.library import LIBRARY, define

_SCHEMAS: dict[str, Callable[..., Any]] = {
    "row_sums(Tensor x) -> (Tensor, Tensor)": reference.row_sums,
    "input_changes(Tensor x, Tensor toward) -> Tensor": reference.input_changes,
    "add_squared_gradients(Tensor(a!) total, Tensor x, Tensor g) -> ()": reference.add_squared_gradients,
}
for _schema, _meaning in _SCHEMAS.items():
    LIBRARY.impl(define(_schema, _meaning), torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("foveate::row_sums", lib=LIBRARY)
def _row_sums_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(3, dtype=torch.float64)


@torch.library.register_fake("foveate::input_changes", lib=LIBRARY)
def _input_changes_fake(x: Tensor, toward: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[0], dtype=torch.float64)


@torch.library.register_fake("foveate::add_squared_gradients", lib=LIBRARY)
def _add_squared_gradients_fake(total: Tensor, x: Tensor, g: Tensor) -> None:
    return None
