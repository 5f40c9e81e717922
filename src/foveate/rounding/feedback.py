"""Round column by column, each passing its error on to the columns that are still to come.

A layer's error is dW x, so what one weight's rounding does wrong on an input, later weights can do right wherever their
inputs are correlated with it. With H = E[x x^T] and U the upper Cholesky factor of its inverse, the column j leaves an
error of which U_jk / U_jj is best taken up by column k (GPTQ: Frantar et al., arXiv:2210.17323; OBQ before it).

The feedback runs at 8 bits. There it halves the loss, and since it moves weights by sixteenths of a 4-bit step, the
prefixes stay those of nearest rounding. Feedback at 4 bits would lower the loss at 4 bits, and leave residual planes
that no longer reach the original weight (figures in docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.rounding.nearest import Rounded

#: Of the mean of H's diagonal, added to the diagonal: what GPTQ uses against inputs that calibration never varied.
DAMPING = 0.01
_BLOCK = 128


def with_feedback(w_NK: Tensor, rounded: Rounded, covariance_KK: Tensor) -> Rounded:
    """The same grids with other codes, chosen for the least error of the layer's output at 8 bits.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its nearest codes (`round_weight`), of reach 0.
        covariance_KK: E[x x^T] of its inputs, in any unit.

    Returns:
        `rounded` with other codes; `rounded` itself if the covariance is of no use (zero, or not positive definite
        even after damping).
    """
    factor_KK = _feedback_factor(covariance_KK)
    if factor_KK is None:
        return rounded
    columns = w_NK.shape[1]
    left_KN = w_NK.t().float().contiguous()
    codes_KN = torch.empty_like(left_KN, dtype=torch.uint8)
    step_GN = rounded.scale.t().float() / 16
    offset_GN = rounded.offset.t().float()
    inverse_GN = torch.where(step_GN > 0, 1 / step_GN, 0.0)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors_bN = torch.empty(stop - start, w_NK.shape[0])
        for j in range(start, stop):
            group = j // rounded.group
            code_N = ((left_KN[j] - offset_GN[group]) * inverse_GN[group] + 127.5).round_().clamp_(0, 255)
            codes_KN[j] = code_N.to(torch.uint8)
            errors_bN[j - start] = left_KN[j] - (offset_GN[group] + step_GN[group] * (code_N - 127.5))
            left_KN[j + 1 : stop].addr_(factor_KK[j, j + 1 : stop], errors_bN[j - start], alpha=-1)
        left_KN[stop:] -= factor_KK[start:stop, stop:].t() @ errors_bN
    codes_NK = codes_KN.t().contiguous()
    return replace(rounded, anchor=codes_NK >> 4, residual=codes_NK & 15)


def _feedback_factor(covariance_KK: Tensor) -> Tensor | None:
    """U_jk / U_jj, float32 [K, K]; None if the covariance is of no use."""
    damped = covariance_KK.double()
    damping = DAMPING * damped.diagonal().mean()
    if not bool(torch.isfinite(damped).all()) or not float(damping) > 0:
        return None
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        return None
    factor: Tensor = (upper / upper.diagonal()[:, None]).float()
    return factor
