"""Round column by column, each passing its error on to the columns that are still to come.

A layer's error is dW x, so what one weight's rounding does wrong on an input, later weights can do right wherever their
inputs are correlated with it. With H = E[x x^T] and U the upper Cholesky factor of its inverse, the column j leaves an
error of which U_jk / U_jj is best taken up by column k (GPTQ: Frantar et al., arXiv:2210.17323; OBQ before it). Columns
go in the order of their inputs' energy, the greatest first, which leaves the most to make up for them.

A nested code is read at five levels, and each makes errors of its own. So each level is a stream: the weight as this
level's errors so far have left it. A column's 4-bit code is the one with the least sum of squared errors over the
streams of levels 2, 3 and 4, weighted by `SHARES`; the residual code is then chosen for levels 6 and 8 in the same way.
Feedback at 4 bits moves codes away from the nearest, out of reach of a residual that spans one 4-bit cell: so a code
also costs `SHORTFALL` times the square of what the residual would lack in the stream of 8 bits. docs/decisions.md has
the figures behind these numbers, and what feedback at one level alone does to the others.

Legend: N rows and K inputs of a weight; n rows of a chunk; C candidates for a code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS, code_range, code_step
from foveate.rounding.nearest import Rounded, restoring_gains

#: Of the mean of H's diagonal, added to the diagonal: what GPTQ uses against inputs that calibration never varied.
DAMPING = 0.01
#: What an error of one 4-bit step costs in the stream of each level. Between those of the anchor and those of the
#: residual only the ratio within counts.
SHARES = {2: 1 / 16, 3: 1 / 4, 4: 1.0, 6: 1.0, 8: 4.0}
SHORTFALL = 4.0
#: The same for a weight that is also an embedding: rows that are looked up gain nothing from feedback.
SHORTFALL_LOOKED_UP = 64.0

_ANCHOR_LEVELS = tuple(level for level in NESTED_LEVELS if level <= 4)
_BLOCK = 64
#: Bytes of the streams of a chunk of rows.
_CHUNK_BYTES = 256 << 20


def with_feedback(w_NK: Tensor, rounded: Rounded, covariance_KK: Tensor, *, shortfall: float = SHORTFALL) -> Rounded:
    """The same grids with other codes, chosen for the least error of the layer's output at every level.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its nearest codes (`round_weight`), of reach 0.
        covariance_KK: E[x x^T] of its inputs, in any unit.
        shortfall: what it costs that a residual cannot reach the stream of 8 bits: more keeps 8 bits near what nearest
            rounding has, and gains less below.

    Returns:
        `rounded` with other codes and gains; `rounded` itself if the covariance is of no use (zero, or not positive
        definite even after damping).
    """
    order_K = torch.argsort(covariance_KK.diagonal(), descending=True, stable=True)
    factor_KK = _feedback_factor(covariance_KK[order_K][:, order_K])
    if factor_KK is None:
        return rounded
    rows, columns = w_NK.shape
    anchor_NK = torch.empty(rows, columns, dtype=torch.uint8)
    residual_NK = torch.empty_like(anchor_NK)
    group_K = order_K // rounded.group
    chunk = max(16, _CHUNK_BYTES // (4 * len(NESTED_LEVELS) * columns))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        gain = rounded.gain if rounded.gain.shape[1] == 1 else rounded.gain[:, part]
        streams = _Streams(w_NK[part].float()[:, order_K].t(), factor_KK, shortfall)
        codes_2Kn = streams.round(rounded.scale[part].float(), rounded.offset[part].float(), gain.float(), group_K)
        anchor_NK[part, order_K] = codes_2Kn[0].t()
        residual_NK[part, order_K] = codes_2Kn[1].t()
    gain = restoring_gains(w_NK, anchor_NK, rounded, covariance_KK.diagonal())
    return replace(rounded, anchor=anchor_NK, residual=residual_NK, gain=gain)


class _Streams:
    """A chunk of rows, columns in the order of feedback, as each level's errors have left them so far."""

    def __init__(self, w_Kn: Tensor, factor_KK: Tensor, shortfall: float) -> None:
        self._factor_KK, self._shortfall = factor_KK, shortfall
        self._left = {level: w_Kn.clone(memory_format=torch.contiguous_format) for level in NESTED_LEVELS}

    def round(self, scale_nG: Tensor, offset_nG: Tensor, gain: Tensor, group_K: Tensor) -> Tensor:
        """Anchor and residual codes, uint8 [2, K, n]."""
        columns, rows = self._left[NESTED_LEVELS[0]].shape
        scale_Gn, offset_Gn = scale_nG.t().contiguous(), offset_nG.t().contiguous()
        inverse_Gn = torch.where(scale_Gn > 0, 1 / scale_Gn, 0.0)
        flat_G = (scale_Gn == 0).any(1).tolist()
        codes_2Kn = torch.empty(2, columns, rows, dtype=torch.uint8)
        gains = {2: gain[0], 3: gain[1], 4: torch.ones(())}
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            errors = {level: torch.empty(stop - start, rows) for level in NESTED_LEVELS}
            for j in range(start, stop):
                group = int(group_K[j])
                scale_n = scale_Gn[group]
                # in 4-bit steps, 0 being the first code's value
                wanted = {k: (w[j] - offset_Gn[group]) * inverse_Gn[group] + 7.5 for k, w in self._left.items()}
                anchor_n, missed = _anchor(wanted, gains, self._shortfall)
                residual_n, missed_above = _residual({k: v - anchor_n for k, v in wanted.items() if k > 4})
                codes_2Kn[0, j], codes_2Kn[1, j] = anchor_n, residual_n
                ahead = self._factor_KK[j, j + 1 : stop]
                for level, missed_n in (missed | missed_above).items():
                    error_n = torch.mul(missed_n, scale_n, out=errors[level][j - start])
                    if flat_G[group]:  # a group without spread is at its offset, whatever its code
                        flat_n = scale_n == 0
                        error_n[flat_n] = (self._left[level][j] - offset_Gn[group])[flat_n]
                    self._left[level][j + 1 : stop].addr_(ahead, error_n, alpha=-1)
            for level, error_bn in errors.items():
                self._left[level][stop:].addmm_(self._factor_KK[start:stop, stop:].t(), error_bn, alpha=-1)
        return codes_2Kn


def _anchor(wanted: dict[int, Tensor], gains: dict[int, Tensor], shortfall: float) -> tuple[Tensor, dict[int, Tensor]]:
    """The 4-bit code of each row, float32 [n], and what it leaves at levels 2, 3 and 4, in 4-bit steps."""
    near_n = wanted[4].round()
    code_Cn = torch.stack([near_n - 1, near_n, near_n + 1]).clamp_(0, 15)
    short_Cn = ((wanted[8] - code_Cn).abs_() - 0.5).clamp_min_(0)
    cost_Cn = short_Cn.square_().mul_(shortfall)
    left: dict[int, Tensor] = {}
    for level in _ANCHOR_LEVELS:
        centred_Cn = (code_Cn * 2.0 ** (level - 4)).floor_().sub_(code_range(level, 0) / 2)
        left[level] = (wanted[level] - 7.5) - centred_Cn.mul_(gains[level]).mul_(code_step(level, 0))
        cost_Cn.addcmul_(left[level], left[level], value=SHARES[level])
    best_1n = cost_Cn.argmin(0, keepdim=True)
    return code_Cn.gather(0, best_1n)[0], {level: e.gather(0, best_1n)[0] for level, e in left.items()}


def _residual(wanted: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The residual code of each row, float32 [n], and what it leaves at levels 6 and 8, in 4-bit steps.

    `wanted` is from the middle of the anchor's cell.
    """
    high_C1 = torch.arange(4.0)[:, None]
    left_6 = wanted[6] - (high_C1 - 1.5) * code_step(6, 0)
    low_Cn = (wanted[8] / code_step(8, 0) + 7.5 - 4 * high_C1).round_().clamp_(0, 3)
    code_Cn = 4 * high_C1 + low_Cn
    left_8 = wanted[8] - (code_Cn - 7.5) * code_step(8, 0)
    best_1n = (SHARES[6] * left_6.square() + SHARES[8] * left_8.square()).argmin(0, keepdim=True)
    return code_Cn.gather(0, best_1n)[0], {6: left_6.gather(0, best_1n)[0], 8: left_8.gather(0, best_1n)[0]}


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
