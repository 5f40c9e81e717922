"""Round a weight for one level only: the baseline for nested codes.

The grid is searched as `nearest` searches it, but in float16, as other libraries have it, and for the error of this one
level. With a covariance, codes are chosen by error feedback and coordinate descent for this one level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.formats.packing import check_group
from foveate.kernels.rounding.grid_search import in_groups, inverse, search
from foveate.rounding.descent import SWEEPS, best_codes
from foveate.rounding.nearest import Rounded, importance_of

_LEAST_SCALE = torch.finfo(torch.float16).smallest_normal * 2.0**-10


def _as_float16(scale_R: Tensor, offset_R: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets in float16, as other libraries store them."""
    return scale_R.half().float(), offset_R.half().float()


def round_for_one_level(
    w_NK: Tensor,
    level: int,
    *,
    group: int,
    input_energy_K: Tensor | None = None,
    covariance_KK: Tensor | None = None,
    gradients_BRR: Tensor | None = None,
) -> Tensor:
    """The weight on the best grid of 2^level codes per group, float32 [N, K].

    Args:
        w_NK: floating point [N, K].
        level: bits, 2 to 4.
        group: inputs per group, 32, 64 or 128; it need not divide K.
        input_energy_K: as `round_weight` takes it.
        covariance_KK: E[x x^T] of the inputs, for error feedback and coordinate descent; nearest codes without it.
        gradients_BRR: as `with_descent` takes it.
    """
    check_group(group)
    w_NK = w_NK.detach().float()
    (rows, columns), half = w_NK.shape, 2 ** (level - 1)
    w_gR, importance_gR = in_groups(w_NK, importance_of(input_energy_K, w_NK), group)

    def codes_from(steps: Tensor) -> Tensor:
        return (steps - 0.5).round_().clamp_(-half, half - 1).add_(0.5)

    def cost(scale_R: Tensor, offset_R: Tensor) -> Tensor:
        steps_gR = (w_gR - offset_R) * inverse(scale_R)
        return (steps_gR - codes_from(steps_gR)).square_().mul_(importance_gR).sum(0) * scale_R.square()

    scale_R, offset_R = search(w_gR, importance_gR, cost, _as_float16, _LEAST_SCALE, level)
    code_gR = codes_from((w_gR - offset_R) * inverse(scale_R)) + (half - 0.5)
    code_NK = code_gR.t().reshape(rows, -1)[:, :columns].to(torch.uint8)
    scale_NG, offset_NG = scale_R.view(rows, -1), offset_R.view(rows, -1)
    if covariance_KK is not None:
        # a nested code whose prefix is this one, on a grid whose steps at this level are these
        shift = 4 - level
        anchor_NK, none_NK = code_NK << shift, torch.zeros_like(code_NK)
        grid = Rounded(anchor_NK, none_NK, scale_NG / 2**shift, offset_NG, torch.ones(2, 1), group)
        better_2NK = best_codes(w_NK, grid, covariance_KK, gradients_BRR, {level: 1.0}, (SWEEPS, 0.0))
        code_NK = code_NK if better_2NK is None else better_2NK[0] >> shift
    scale_NK, offset_NK = (t.repeat_interleave(group, 1)[:, :columns] for t in (scale_NG, offset_NG))
    dense_NK: Tensor = offset_NK + scale_NK * (code_NK.float() - (half - 0.5))
    return dense_NK
