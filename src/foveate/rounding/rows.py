"""Rows take up the errors of the rows before them, by the covariance of their outputs' gradients.

To second order a change dW of a weight costs 1/2 E[(g^T dW x)^2], and where gradients g and inputs x are independent
that is 1/2 tr(G dW H dW^T), G = E[g g^T], H = E[x x^T] (K-FAC: Martens and Grosse, arXiv:1503.05671). Feedback between
columns minimizes it as if G were diagonal. But outputs of a layer matter to the outcome together: what one row does
wrong, another can do right. Given the errors of the rows that are done, the best changes of the others are
-G_22^-1 G_21 dW_1, whatever H is: so rows are rounded block by block, and each block starts from what the errors before
it have left (two-sided feedback, as in YAQA: Tseng et al., arXiv:2505.22988). Within a block rows know nothing of each
other, which costs little where there are many blocks, and lets them be rounded together.

G is kept for some hundred rows at a time (`foveate.collect.statistics`), so that it takes no more numbers than a weight
of as many inputs; rows that are further apart do not help each other.

Legend: N rows and K inputs of a weight, S streams, B blocks of R rows of G, n rows that are rounded together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Of the mean of a covariance's diagonal, added to the diagonal: what GPTQ uses against inputs that calibration never
#: varied.
DAMPING = 0.01
#: At least so many rows are rounded together, and a block's in so many parts, one after another.
_LEAST_ROWS, PARTS = 16, 16
#: Bytes of the streams of rows that are rounded together.
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows that help each other, the greatest gradients first, and U of their G; None: each is for itself."""

    rows_R: Tensor
    upper_RR: Tensor | None

    def part(self, number: int) -> slice:
        """Which of its rows are rounded together as the `number`th part; empty behind the last."""
        rows = len(self.rows_R)
        step = rows if self.upper_RR is None else max(_LEAST_ROWS, -(-rows // PARTS))
        return slice(min(number * step, rows), min((number + 1) * step, rows))

    def pass_on(self, part: slice, missed_SnK: Tensor, wanted_SRK: Tensor) -> None:
        """Let the rows behind a part want what makes up for what it missed."""
        if self.upper_RR is not None and part.stop < len(self.rows_R):
            own_nn, later = self.upper_RR[part, part], self.upper_RR[part, part.stop :]
            share = torch.linalg.solve_triangular(own_nn, later, upper=True).t().float()
            wanted_SRK[:, part.stop :] -= share @ missed_SnK


def feed_rows(
    w_NK: Tensor, count: int, gradients_BRR: Tensor | None, round_rows: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Hand out rows, and take what their rounding missed into account in the rows that are left.

    Args:
        w_NK: the weight, float32.
        count: how many streams.
        gradients_BRR: E[g g^T] of each R rows, in any unit; where it is of no use, rows are on their own.
        round_rows: from the numbers of some rows [n], and what is wanted of them in each stream [S, n, K], to what it
            missed [S, n, K].
    """
    rows = torch.arange(len(w_NK))
    chunk = max(16, _CHUNK_BYTES // (4 * count * w_NK.shape[1]))
    if gradients_BRR is None:
        blocks = [_Block(part, None) for part in rows.split(chunk)]
    else:
        size = gradients_BRR.shape[1]
        blocks = [_block_of(part, g_RR) for part, g_RR in zip(rows.split(size), gradients_BRR, strict=True)]
        chunk = max(chunk, size)
    at_once = max(1, chunk // max(len(block.rows_R) for block in blocks))
    for start in range(0, len(blocks), at_once):
        # blocks do not help each other, so the parts of several are rounded in one go
        together = blocks[start : start + at_once]
        wanted = [w_NK[block.rows_R].expand(count, -1, -1).clone() for block in together]
        for number in range(PARTS):
            parts = [block.part(number) for block in together]
            rows_n = torch.cat([block.rows_R[part] for block, part in zip(together, parts, strict=True)])
            if not len(rows_n):
                break
            now_SnK = torch.cat([w_SRK[:, part] for w_SRK, part in zip(wanted, parts, strict=True)], 1)
            missed = round_rows(rows_n, now_SnK).split([part.stop - part.start for part in parts], 1)
            for block, part, missed_SnK, wanted_SRK in zip(together, parts, missed, wanted, strict=True):
                block.pass_on(part, missed_SnK, wanted_SRK)


def _block_of(rows_R: Tensor, gradients_RR: Tensor) -> _Block:
    inside_RR = gradients_RR[: len(rows_R), : len(rows_R)]
    order_R = torch.argsort(inside_RR.diagonal(), descending=True, stable=True)
    upper_RR = inverse_factor(inside_RR[order_R][:, order_R])
    return _Block(rows_R, None) if upper_RR is None else _Block(rows_R[order_R], upper_RR)


def inverse_factor(covariance: Tensor) -> Tensor | None:
    """The upper Cholesky factor U of the damped inverse, U^T U = (C + d I)^-1, float64; None if C is of no use."""
    damped = covariance.double()
    damping = DAMPING * damped.diagonal().mean()
    if not bool(torch.isfinite(damped).all()) or not float(damping) > 0:
        return None
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else upper
