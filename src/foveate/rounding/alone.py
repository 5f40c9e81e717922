"""Round a weight for one level and no other: what nested codes are measured against.

The grid is searched as `nearest` searches it, but in float16, as other libraries have it, and for the error of this
level alone; with a covariance the codes get the error feedback of this level alone, which is GPTQ with searched scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.formats.packing import check_group
from foveate.rounding.feedback import feed_back, feedback_factor, grid_of, order_of
from foveate.rounding.nearest import importance_of, in_groups, inverse, search
from foveate.rounding.rows import feed_rows

_LEAST_SCALE = torch.finfo(torch.float16).smallest_normal * 2.0**-10


def _as_float16(scale_R: Tensor, offset_R: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets as other libraries store them."""
    return scale_R.half().float(), offset_R.half().float()


def round_alone(
    w_NK: Tensor,
    level: int,
    *,
    group: int,
    input_energy_K: Tensor | None = None,
    covariance_KK: Tensor | None = None,
    gradients_BRR: Tensor | None = None,
) -> Tensor:
    """The weight on the best grid of 2^level codes a group, float32 [N, K].

    Args:
        w_NK: floating point [N, K].
        level: bits.
        group: inputs a group, 32, 64 or 128; K need not divide.
        input_energy_K: as `round_weight` takes it.
        covariance_KK: E[x x^T] of the inputs, for error feedback; nearest codes without it.
        gradients_BRR: as `with_feedback` takes it.
    """
    check_group(group)
    w_NK = w_NK.detach().float()
    rows, half = len(w_NK), 2 ** (level - 1)
    w_gR, root_gR = in_groups(w_NK, importance_of(input_energy_K, w_NK), group)

    def codes_from(steps: Tensor) -> Tensor:
        return (steps - 0.5).round_().clamp_(-half, half - 1).add_(0.5)

    def cost(scale_R: Tensor, offset_R: Tensor) -> Tensor:
        steps_gR = (w_gR - offset_R) * inverse(scale_R)
        return (steps_gR - codes_from(steps_gR)).mul_(root_gR).square_().sum(0) * scale_R.square()

    scale_NG, offset_NG = (t.view(rows, -1) for t in search(w_gR, root_gR, cost, _as_float16, _LEAST_SCALE, level))
    order_K = torch.arange(w_NK.shape[1]) if covariance_KK is None else order_of(covariance_KK)
    factor_KK = None if covariance_KK is None else feedback_factor(covariance_KK[order_K][:, order_K])
    if factor_KK is None:
        factor_KK = torch.eye(w_NK.shape[1])

    def choose(wanted_1n: Tensor) -> tuple[Tensor, Tensor]:
        code_1n = codes_from(wanted_1n)
        return code_1n + (half - 0.5), wanted_1n - code_1n

    dense_NK = torch.empty_like(w_NK)

    def round_rows(rows_n: Tensor, wanted_1nK: Tensor) -> Tensor:
        grid = grid_of(scale_NG[rows_n], offset_NG[rows_n], group, order_K)
        codes_Kn = feed_back(wanted_1nK[:, :, order_K].transpose(1, 2).contiguous(), factor_KK, grid, choose)[0].float()
        values_Kn = grid.offset_Gn[grid.group_K] + grid.scale_Gn[grid.group_K] * (codes_Kn - (half - 0.5))
        dense_NK[rows_n[:, None], order_K] = values_Kn.t()
        return wanted_1nK - dense_NK[rows_n]

    feed_rows(w_NK, 1, gradients_BRR, round_rows)
    return dense_NK
