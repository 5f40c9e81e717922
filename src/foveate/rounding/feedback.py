"""Round column by column, each passing its error on to the columns that are still to come; and rows to later rows.

A layer's error is dW x, so what one weight's rounding does wrong on an input, later weights can do right wherever their
inputs are correlated with it. With H = E[x x^T] and U the upper Cholesky factor of its inverse, the column j leaves an
error of which U_jk / U_jj is best taken up by column k (GPTQ: Frantar et al., arXiv:2210.17323; OBQ before it). Columns
go in the order of their inputs' energy, the greatest first, which leaves the most to make up for them. What a row does
wrong to the outcome, other rows can do right in the same way (`foveate.rounding.rows`).

A nested code is read at five levels, and each makes errors of its own. So each level is a stream: the weight as this
level's errors so far have left it. A column's 4-bit code is the one with the least sum of squared errors over the
streams of levels 2, 3 and 4, weighted by `SHARES`; the residual code is then chosen for levels 6 and 8 in the same way.
Feedback at 4 bits moves codes away from the nearest, out of reach of a residual that spans one 4-bit cell: so a code
also costs `SHORTFALL` times the square of what the residual would lack in the stream of 8 bits. docs/decisions.md has
the figures behind these numbers, and what feedback at one level alone does to the others.

Legend: N rows and K inputs of a weight; n rows of a chunk; S streams; C candidates for a code; R rows of a block of the
gradients' covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS, code_range, code_step
from foveate.rounding.nearest import Rounded, inverse, restoring_gains
from foveate.rounding.rows import feed_rows, inverse_factor

#: What an error of one 4-bit step costs in the stream of each level. Between those of the anchor and those of the
#: residual only the ratio within counts.
SHARES = {2: 1 / 16, 3: 1 / 4, 4: 1.0, 6: 1.0, 8: 4.0}
SHORTFALL = 4.0
#: The same for a weight that is also an embedding: rows that are looked up gain nothing from feedback.
SHORTFALL_LOOKED_UP = 64.0

_ANCHORS = sum(level <= 4 for level in NESTED_LEVELS)
_BLOCK = 64

#: From what is wanted of a column in each stream [S, n], in steps from the offset, to its codes [codes, n] and what
#: they miss [S, n].
Chooser = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Grid:
    """The scales and offsets of some rows, [G, n], and the group of each column in the order of feedback."""

    scale_Gn: Tensor
    offset_Gn: Tensor
    group_K: Tensor


@torch.no_grad()
def with_feedback(
    w_NK: Tensor,
    rounded: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None = None,
    *,
    shortfall: float = SHORTFALL,
) -> Rounded:
    """The same grids with other codes, chosen for the least error of the outcome at every level.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its nearest codes (`round_weight`), of reach 0.
        covariance_KK: E[x x^T] of its inputs, in any unit.
        gradients_BRR: E[g g^T] of its outputs' gradients, in any unit, for each R rows (`foveate.rounding.rows`); rows
            are rounded each for itself if not given.
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
    codes_2NK = torch.empty(2, *w_NK.shape, dtype=torch.uint8)

    def round_rows(rows_n: Tensor, wanted_SnK: Tensor) -> Tensor:
        gain_2n = rounded.gain.float() if rounded.gain.shape[1] == 1 else rounded.gain[:, rows_n].float()
        grid = grid_of(rounded.scale[rows_n], rounded.offset[rows_n], rounded.group, order_K)
        streams_SKn = wanted_SnK[:, :, order_K].transpose(1, 2).contiguous()
        codes_2Kn = feed_back(streams_SKn, factor_KK, grid, nested_codes(gain_2n, shortfall))
        codes_2NK[:, rows_n[:, None], order_K] = codes_2Kn.transpose(1, 2)
        return wanted_SnK - in_order(streams_SKn, order_K)

    feed_rows(w_NK.float(), len(NESTED_LEVELS), gradients_BRR, round_rows)
    gain = restoring_gains(w_NK, codes_2NK[0], rounded, covariance_KK.diagonal())
    return replace(rounded, anchor=codes_2NK[0], residual=codes_2NK[1], gain=gain)


def grid_of(scale_nG: Tensor, offset_nG: Tensor, group: int, order_K: Tensor) -> Grid:
    """The grid of some rows for columns in the order of feedback."""
    return Grid(scale_nG.float().t().contiguous(), offset_nG.float().t().contiguous(), order_K // group)


def in_order(streams_SKn: Tensor, order_K: Tensor) -> Tensor:
    """[S, n, K] with columns where they were before `order_K`."""
    back_SnK = torch.empty_like(streams_SKn.transpose(1, 2))
    back_SnK[:, :, order_K] = streams_SKn.transpose(1, 2)
    return back_SnK


def feed_back(streams_SKn: Tensor, factor_KK: Tensor, grid: Grid, choose: Chooser) -> Tensor:
    """Choose a column's codes, pass what they miss on to the columns that are left, and go on to the next.

    Args:
        streams_SKn: the weights in the order of feedback, once for each stream; changed in place to the values that the
            codes stand for.
        factor_KK: U_jk / U_jj.
        grid: scales and offsets.
        choose: how.

    Returns:
        uint8 [codes, K, n].
    """
    count, columns, rows = streams_SKn.shape
    inverse_Gn = inverse(grid.scale_Gn)
    flat_G = (grid.scale_Gn == 0).any(1).tolist()
    group_K = grid.group_K.tolist()
    codes: list[Tensor] = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors_Sbn = torch.empty(count, stop - start, rows)
        for j in range(start, stop):
            group = group_K[j]
            scale_n, offset_n, now_Sn = grid.scale_Gn[group], grid.offset_Gn[group], streams_SKn[:, j]
            chosen, missed_Sn = choose((now_Sn - offset_n).mul_(inverse_Gn[group]))
            codes.append(chosen.to(torch.uint8))
            error_Sn = missed_Sn.mul_(scale_n)
            if flat_G[group]:  # a group of nothing is at its offset, whatever its code
                error_Sn = torch.where(scale_n == 0, now_Sn - offset_n, error_Sn)
            errors_Sbn[:, j - start] = error_Sn
            now_Sn -= error_Sn
            if j + 1 < stop:
                streams_SKn[:, j + 1 : stop].addcmul_(factor_KK[j, j + 1 : stop, None], error_Sn[:, None], value=-1)
        if stop < columns:
            later_Kb = factor_KK[start:stop, stop:].t()
            for stream_Kn, error_bn in zip(streams_SKn[:, stop:], errors_Sbn, strict=True):
                stream_Kn.addmm_(later_Kb, error_bn, alpha=-1)
    return torch.stack(codes, 1)


def nested_codes(gain_2n: Tensor, shortfall: float) -> Chooser:
    """How a column's anchor and residual are chosen, for streams of every nested level in order."""
    anchors = NESTED_LEVELS[:_ANCHORS]
    anchor_16 = torch.arange(16.0)
    table_A16 = torch.stack(
        [((anchor_16 * 2.0 ** (k - 4)).floor() - code_range(k, 0) / 2) * code_step(k, 0) for k in anchors]
    )
    gain_A1n = torch.cat([gain_2n, torch.ones_like(gain_2n[:1])])[:, None]
    share_A11 = torch.tensor([SHARES[k] for k in anchors])[:, None, None]
    beside_C1 = torch.tensor([[-1.0], [0.0], [1.0]])
    table_B161 = torch.stack([((anchor_16 / 4).floor() - 1.5) / 4, (anchor_16 - 7.5) / 16])[:, :, None]
    share_B11 = torch.tensor([SHARES[k] for k in NESTED_LEVELS[_ANCHORS:]])[:, None, None]

    def choose(wanted_Sn: Tensor) -> tuple[Tensor, Tensor]:
        code_Cn = ((wanted_Sn[_ANCHORS - 1] + 7.5).round_() + beside_C1).clamp_(0, 15)
        left_ACn = wanted_Sn[:_ANCHORS, None] - table_A16[:, code_Cn.long()].mul_(gain_A1n)
        short_Cn = (wanted_Sn[-1] + 7.5 - code_Cn).abs_().sub_(0.5).clamp_min_(0)
        cost_Cn = left_ACn.square().mul_(share_A11).sum(0).addcmul_(short_Cn, short_Cn, value=shortfall)
        best_1n = cost_Cn.argmin(0, keepdim=True)
        anchor_1n = code_Cn.gather(0, best_1n)
        left_An = left_ACn.gather(1, best_1n.expand(_ANCHORS, 1, -1))[:, 0]
        # the residual counts from the middle of the anchor's cell
        left_B16n = (wanted_Sn[_ANCHORS:] + 7.5 - anchor_1n)[:, None] - table_B161
        residual_1n = left_B16n.square().mul_(share_B11).sum(0).argmin(0, keepdim=True)
        left_Bn = left_B16n.gather(1, residual_1n.expand(len(left_B16n), 1, -1))[:, 0]
        return torch.cat([anchor_1n, residual_1n.float()]), torch.cat([left_An, left_Bn])

    return choose


def order_of(covariance_KK: Tensor) -> Tensor:
    """Columns by the energy of their inputs, the greatest first, int64 [K]."""
    return torch.argsort(covariance_KK.diagonal(), descending=True, stable=True)


def feedback_factor(covariance_KK: Tensor) -> Tensor | None:
    """U_jk / U_jj, float32 [K, K]; None if the covariance is of no use."""
    upper = inverse_factor(covariance_KK)
    return None if upper is None else (upper / upper.diagonal()[:, None]).float()
