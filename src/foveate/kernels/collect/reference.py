"""The meaning of the ops on statistics, in plain torch.

Legend: T rows and K columns of x; N outputs; B samples of T rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.planes.inputs import INPUT_RANGE, block_codes

#: The least magnitude that the scale of a row at 8 bits is made from.
_LEAST = 1e-30


def row_sums(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all rows, read once.

    Args:
        x_TK: float32. NaN spoils the sums of its column, and is passed over in the extremes.

    Returns:
        (float64 [K], the sum of squares of each column; float64 [3]: the sum of all values, the least and the greatest.
        Without values these are 0, Inf and -Inf).
    """
    squares_K = x_TK.double().square().sum(0)
    number = ~x_TK.isnan()
    least = torch.where(number, x_TK, torch.inf).amin() if x_TK.numel() else torch.tensor(torch.inf)
    most = torch.where(number, x_TK, -torch.inf).amax() if x_TK.numel() else torch.tensor(-torch.inf)
    return squares_K, torch.stack([x_TK.double().sum(), least.double(), most.double()])


def input_changes(x_TK: Tensor, toward_TK: Tensor) -> Tensor:
    """What the rounding of each row at input levels 4 and 8 changes, float64 [2, T].

    The change of a row is the sum of (rounded - x) * toward over its columns, to the rounding of float32 sums. The
    rounded row is that of `foveate.kernels.planes.inputs.quantize_input`; at 8 bits a row of zeros is exact.

    Args:
        x_TK: float32, finite.
        toward_TK: float32, the gradient of the loss with respect to x.
    """
    codes_TK, unit_T1 = block_codes(x_TK)
    four_T = ((codes_TK * unit_T1 - x_TK) * toward_TK).sum(1, dtype=torch.float64)
    top = INPUT_RANGE[8]
    largest_T1 = x_TK.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    codes_TK = (x_TK * (torch.tensor(top) / largest_T1)).round()
    eight_T = ((codes_TK * (largest_T1 / top) - x_TK) * toward_TK).sum(1, dtype=torch.float64)
    # a row of zeros is exact, and its unit is 0
    return torch.stack([torch.where(unit_T1[:, 0] > 0, four_T, 0.0), eight_T])


def add_squared_gradients(total_NK: Tensor, x_BTK: Tensor, g_BTN: Tensor) -> None:
    """Add the squared gradient of each sample: total[n, k] += sum_b (sum_t g[b, t, n] x[b, t, k])^2.

    Args:
        total_NK: float32, changed in place.
        x_BTK: float32, the input rows of each sample.
        g_BTN: float32, the gradients of its output rows.
    """
    total_NK += torch.bmm(g_BTN.transpose(1, 2), x_BTK).square().sum(0)
