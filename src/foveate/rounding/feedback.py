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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS, code_range, code_step
from foveate.rounding.nearest import Rounded, inverse, restoring_gains

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


#: By level: weights, or what is wanted of or missed by a code, in steps.
Streams = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Grid:
    """The scales and offsets of a chunk of rows, [G, n], and the group of each column in the order of feedback."""

    scale_Gn: Tensor
    offset_Gn: Tensor
    group_K: Tensor


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
    order_K = order_of(covariance_KK)
    factor_KK = feedback_factor(covariance_KK[order_K][:, order_K])
    if factor_KK is None:
        return rounded
    rows, columns = w_NK.shape
    codes_2NK = torch.empty(2, rows, columns, dtype=torch.uint8)
    for part, w_Kn, grid in columns_of(w_NK, rounded.scale, rounded.offset, rounded.group, order_K):
        gain = rounded.gain.float() if rounded.gain.shape[1] == 1 else rounded.gain[:, part].float()
        gains = {2: gain[0], 3: gain[1], 4: torch.ones(())}

        def choose(wanted: Streams, gains: Streams = gains) -> tuple[tuple[Tensor, ...], Streams]:
            anchor_n, missed = _anchor(wanted, gains, shortfall)
            residual_n, missed_above = _residual({k: v + 7.5 - anchor_n for k, v in wanted.items() if k > 4})
            return (anchor_n, residual_n), missed | missed_above

        streams = {level: w_Kn.clone() for level in NESTED_LEVELS}
        codes_2NK[:, part, order_K] = feed_back(streams, factor_KK, grid, choose).transpose(1, 2)
    gain = restoring_gains(w_NK, codes_2NK[0], rounded, covariance_KK.diagonal())
    return replace(rounded, anchor=codes_2NK[0], residual=codes_2NK[1], gain=gain)


def columns_of(
    w_NK: Tensor, scale_NG: Tensor, offset_NG: Tensor, group: int, order_K: Tensor
) -> Iterator[tuple[slice, Tensor, Grid]]:
    """Chunks of rows: which, their weights [K, n] with columns in the order of feedback, and their grids."""
    chunk = max(16, _CHUNK_BYTES // (4 * len(NESTED_LEVELS) * w_NK.shape[1]))
    for start in range(0, len(w_NK), chunk):
        part = slice(start, start + chunk)
        scale_Gn, offset_Gn = (t[part].float().t().contiguous() for t in (scale_NG, offset_NG))
        grid = Grid(scale_Gn, offset_Gn, order_K // group)
        yield part, w_NK[part].float()[:, order_K].t().contiguous(), grid


def feed_back(
    streams: Streams, factor_KK: Tensor, grid: Grid, choose: Callable[[Streams], tuple[tuple[Tensor, ...], Streams]]
) -> Tensor:
    """Choose a column's codes, pass what they miss on to the columns that are left, and go on to the next.

    Args:
        streams: the weights [K, n] in the order of feedback, one for each level; changed in place.
        factor_KK: U_jk / U_jj.
        grid: scales and offsets.
        choose: from what is wanted, in steps from the offset, to the codes of a column and what they miss, in steps.

    Returns:
        uint8 [codes, K, n].
    """
    columns, rows = next(iter(streams.values())).shape
    inverse_Gn = inverse(grid.scale_Gn)
    flat_G = (grid.scale_Gn == 0).any(1).tolist()
    group_K = grid.group_K.tolist()
    codes: list[Tensor] = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = {level: torch.empty(stop - start, rows) for level in streams}
        for j in range(start, stop):
            group = group_K[j]
            scale_n, offset_n = grid.scale_Gn[group], grid.offset_Gn[group]
            chosen, missed = choose({k: (w_Kn[j] - offset_n) * inverse_Gn[group] for k, w_Kn in streams.items()})
            codes.append(torch.stack(chosen).to(torch.uint8))
            for level, missed_n in missed.items():
                error_n = torch.mul(missed_n, scale_n, out=errors[level][j - start])
                if flat_G[group]:  # a group without spread is at its offset, whatever its code
                    flat_n = scale_n == 0
                    error_n[flat_n] = (streams[level][j] - offset_n)[flat_n]
                streams[level][j + 1 : stop].addr_(factor_KK[j, j + 1 : stop], error_n, alpha=-1)
        for level, error_bn in errors.items():
            streams[level][stop:].addmm_(factor_KK[start:stop, stop:].t(), error_bn, alpha=-1)
    return torch.stack(codes, 1)


def _anchor(wanted: dict[int, Tensor], gains: dict[int, Tensor], shortfall: float) -> tuple[Tensor, dict[int, Tensor]]:
    """The 4-bit code of each row, float32 [n], and what it leaves at levels 2, 3 and 4, in 4-bit steps."""
    near_n = (wanted[4] + 7.5).round()
    code_Cn = torch.stack([near_n - 1, near_n, near_n + 1]).clamp_(0, 15)
    short_Cn = ((wanted[8] + 7.5 - code_Cn).abs_() - 0.5).clamp_min_(0)
    cost_Cn = short_Cn.square_().mul_(shortfall)
    left: Streams = {}
    for level in _ANCHOR_LEVELS:
        centred_Cn = (code_Cn * 2.0 ** (level - 4)).floor_().sub_(code_range(level, 0) / 2)
        left[level] = wanted[level] - centred_Cn.mul_(gains[level]).mul_(code_step(level, 0))
        cost_Cn.addcmul_(left[level], left[level], value=SHARES[level])
    best_1n = cost_Cn.argmin(0, keepdim=True)
    return code_Cn.gather(0, best_1n)[0], {level: e.gather(0, best_1n)[0] for level, e in left.items()}


def _residual(wanted: Streams) -> tuple[Tensor, Streams]:
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


def order_of(covariance_KK: Tensor) -> Tensor:
    """Columns by the energy of their inputs, the greatest first, int64 [K]."""
    return torch.argsort(covariance_KK.diagonal(), descending=True, stable=True)


def feedback_factor(covariance_KK: Tensor) -> Tensor | None:
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
