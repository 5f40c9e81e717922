"""The meaning of `error_feedback` and `coordinate_descent`, in plain torch.

Both loop over elements, and over many rows at once where rows are independent of each other.

A stream s is one of the nested levels, and level_weight_s is what its squared error counts. dW_s is the error of the
weight in that stream: the values that its codes have at that level, minus the weight. H is the covariance of inputs,
and G that of outputs' gradients. The codes are to make

    J = sum_s level_weight_s tr(G dW_s H dW_s^T)

small.

**Error feedback** goes through the elements once, column by column, and assumes that all elements that follow can
still take any value. Then the best answer of element k to an error in element j is to change by -U_jk / U_jj of it,
with U the upper Cholesky factor of H^-1 (GPTQ, arXiv 2210.17323); likewise for rows and G. So in each stream the
wanted value is the weight as its errors so far have left it.

**Coordinate descent** knows all elements as they are. In one of them J is a parabola, and its minimum is where the
value would be

    wanted_s = value_s - (G dW_s H)_ij / (G_ii H_jj)

so no step makes J greater. Both take the pair of codes that minimizes sum_s level_weight_s (wanted_s - value_s)^2.

Legend: S = 5 streams, levels 2, 3, 4, 6, 8; N rows and K inputs; n rows at once; B blocks of R rows; G groups of each
row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.formats.levels import ANCHOR_STEPS, REACHES

_CODES = 16
#: Rows in a block where they are on their own.
LONE_ROWS = 64


def code_values(gain_2n: Tensor, reach: int = 0) -> Tensor:
    """The values of all pairs of codes, in steps from the offset, float32 [S, 16 anchors, 16 residuals, n]."""
    code_16 = torch.arange(_CODES, dtype=torch.float32)
    anchor_A16 = torch.stack([4 * (code_16 // 4) - 6, 2 * (code_16 // 2) - 7, code_16 - 7.5])
    residual_B16 = torch.stack([(code_16 // 4 - 1.5) / 4, (code_16 - 7.5) / 16]) * (16 / ANCHOR_STEPS[reach])
    gain_An = torch.cat([gain_2n, torch.ones_like(gain_2n[:1])])
    anchors = (anchor_A16[:, :, None] * gain_An[:, None])[:, :, None].expand(-1, -1, _CODES, -1)
    both = anchor_A16[2][:, None] + residual_B16[:, None]
    return torch.cat([anchors, both[..., None].expand(*both.shape, gain_2n.shape[1])])


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows that depend on each other, and their part of each tensor. Codes are written in place."""

    codes_2nK: Tensor
    w_nK: Tensor
    between_nn: Tensor | None
    step_nK: Tensor
    middle_nK: Tensor
    values_SAAn: Tensor
    level_weight_S: Tensor

    def rows(self) -> list[Tensor]:
        """The rows that are rounded at once, part after part."""
        here_n = torch.arange(len(self.w_nK))
        return [here_n] if self.between_nn is None else list(here_n.split(1))

    def values(self, column: slice | int, n: Tensor) -> Tensor:
        """The values of the codes of some rows, [S, n] or [S, n, K]."""
        anchor, residual = (codes[n][:, column].long() for codes in self.codes_2nK)
        rows = n if isinstance(column, int) else n[:, None]
        chosen = self.values_SAAn[:, anchor, residual, rows]
        return self.middle_nK[n][:, column] + self.step_nK[n][:, column] * chosen

    def choose(self, j: int, n: Tensor, wanted_Sn: Tensor) -> Tensor:
        """Write the best codes and return their values [S, n]. Where the scale is 0 the codes stay."""
        left_SAAn = ((wanted_Sn - self.middle_nK[n, j]) / self.step_nK[n, j])[:, None, None] - self.values_SAAn[..., n]
        best_n = (left_SAAn.square() * self.level_weight_S[:, None, None, None]).sum(0).flatten(0, 1).argmin(0)
        pair_2n = torch.stack([best_n // _CODES, best_n % _CODES]).to(torch.uint8)
        self.codes_2nK[:, n, j] = torch.where(self.step_nK[n, j] > 0, pair_2n, self.codes_2nK[:, n, j])
        return self.values(j, n)


def _blocks(
    codes_2NK: Tensor,
    w_NK: Tensor,
    between_BRR: Tensor | None,
    scale_NG: Tensor,
    offset_NG: Tensor,
    gain_2N: Tensor,
    group_of_K: Tensor,
    level_weights: Sequence[float],
    reach: int,
) -> Iterator[_Block]:
    if reach not in REACHES:
        raise RuntimeError(f"reach (={reach}) is not one of 0, 1, 2, 3")
    size = LONE_ROWS if between_BRR is None else between_BRR.shape[1]
    for number, start in enumerate(range(0, len(w_NK), size)):
        rows = slice(start, min(start + size, len(w_NK)))
        count = rows.stop - rows.start
        yield _Block(
            codes_2NK[:, rows],
            w_NK[rows],
            None if between_BRR is None else between_BRR[number, :count, :count],
            scale_NG[rows][:, group_of_K],
            offset_NG[rows][:, group_of_K],
            code_values(gain_2N[:, rows], reach),
            torch.tensor(list(level_weights), dtype=torch.float32),
        )


def error_feedback(
    codes_2NK: Tensor,
    w_NK: Tensor,
    factor_KK: Tensor,
    row_factor_BRR: Tensor | None,
    scale_NG: Tensor,
    offset_NG: Tensor,
    gain_2N: Tensor,
    group_of_K: Tensor,
    level_weights: Sequence[float],
    reach: int = 0,
) -> None:
    """Choose codes in the order of columns, and within a column in the order of rows.

    Args:
        codes_2NK: uint8, written: the 4-bit codes and the residuals.
        w_NK: float32.
        factor_KK: U_jk / U_jj above the diagonal, float32; all other elements are ignored.
        row_factor_BRR: for each R rows, transposed and without its diagonal: row i has U_ki / U_kk for each k before
            it. The last block may be cut off. Rows are independent if not given.
        scale_NG, offset_NG: float32, of each group of columns.
        gain_2N: float32, of levels 2 and 3.
        group_of_K: int64, the group of each column.
        level_weights: what a squared error counts, for each stream.
        reach: of the residuals, 0 to 3; their steps are 16 / ANCHOR_STEPS[reach] as wide as without one.
    """
    grid = (scale_NG, offset_NG, gain_2N, group_of_K, level_weights, reach)
    for block in _blocks(codes_2NK, w_NK, row_factor_BRR, *grid):
        stream_SnK = block.w_nK.expand(len(block.level_weight_S), -1, -1).clone()
        for j in range(w_NK.shape[1]):
            missed_Sn = torch.zeros_like(stream_SnK[:, :, j])
            for n in block.rows():
                wanted_Sn = stream_SnK[:, n, j]
                if block.between_nn is not None:
                    wanted_Sn = wanted_Sn - (missed_Sn @ block.between_nn[n[0]])[:, None]
                missed_Sn[:, n] = wanted_Sn - block.choose(j, n, wanted_Sn)
            all_Sn = stream_SnK[:, :, j] - block.values(j, torch.arange(len(block.w_nK)))
            stream_SnK[:, :, j + 1 :] -= all_Sn[:, :, None] * factor_KK[j, j + 1 :]


def coordinate_descent(
    codes_2NK: Tensor,
    w_NK: Tensor,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None,
    scale_NG: Tensor,
    offset_NG: Tensor,
    gain_2N: Tensor,
    group_of_K: Tensor,
    level_weights: Sequence[float],
    sweeps: int,
    least_gain: float = 0.0,
    reach: int = 0,
) -> Tensor:
    """Change codes to better ones, in the same order.

    Args:
        codes_2NK: uint8, changed in place.
        w_NK: float32.
        covariance_KK: H, float32, symmetric and positive definite.
        gradients_BRR: G of each R rows, likewise (the last block may be cut off); rows are on their own if not given.
        scale_NG, offset_NG, gain_2N, group_of_K, level_weights: as for `error_feedback`.
        sweeps: how often all elements are gone through, at most.
        least_gain: a block of rows is left after a sweep that took less than this part off its J. J is the sum of
            level_weight * error * (G dW H) over the elements, each as it is before its turn.
        reach: as for `error_feedback`.

    Returns:
        How many sweeps each block took, int64 [B].
    """
    made = []
    grid = (scale_NG, offset_NG, gain_2N, group_of_K, level_weights, reach)
    for block in _blocks(codes_2NK, w_NK, gradients_BRR, *grid):
        error_SnK = block.values(slice(None), torch.arange(len(block.w_nK))) - block.w_nK
        weight_S1 = block.level_weight_S[:, None]
        made.append(0)
        for _ in range(sweeps):
            form = gained = 0.0
            for j in range(w_NK.shape[1]):
                own = covariance_KK[j, j]
                pull_Sn = error_SnK @ covariance_KK[j]
                for n in block.rows():
                    metric = 1.0 if block.between_nn is None else block.between_nn[n[0], n[0]]
                    pulled_Sn = pull_Sn[:, n]
                    if block.between_nn is not None:
                        pulled_Sn = (pull_Sn @ block.between_nn[n[0]])[:, None]
                    before_Sn = error_SnK[:, n, j]
                    form += float((weight_S1 * before_Sn * pulled_Sn).sum(dtype=torch.float64))
                    best_Sn = before_Sn - pulled_Sn / metric / own
                    now_Sn = block.choose(j, n, block.w_nK[n, j] + best_Sn) - block.w_nK[n, j]
                    less_Sn = (before_Sn - best_Sn).square() - (now_Sn - best_Sn).square()
                    gained += float((weight_S1 * less_Sn).sum(dtype=torch.float64) * own * metric)
                    pull_Sn[:, n] += (now_Sn - before_Sn) * own
                    error_SnK[:, n, j] = now_Sn
            made[-1] += 1
            if gained < least_gain * form:
                break
    return torch.tensor(made, dtype=torch.int64)
