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

import torch
from torch import Tensor

#: Of the mean of a covariance's diagonal, added to the diagonal: what GPTQ uses against inputs that calibration never
#: varied.
DAMPING = 0.01
#: At least so many rows are rounded together, and at most a part of a block.
_LEAST_ROWS, _PARTS = 16, 16
#: Bytes of the streams of rows that are rounded together.
_CHUNK_BYTES = 256 << 20


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
    rows = len(w_NK)
    chunk = max(16, _CHUNK_BYTES // (4 * count * w_NK.shape[1]))
    size = chunk if gradients_BRR is None else gradients_BRR.shape[1]
    for block, first in enumerate(range(0, rows, size)):
        inside = torch.arange(first, min(first + size, rows))
        upper = order = None
        if gradients_BRR is not None:
            together = gradients_BRR[block, : len(inside), : len(inside)]
            order = torch.argsort(together.diagonal(), descending=True, stable=True)
            upper = inverse_factor(together[order][:, order])
        if upper is None or order is None:
            for part in inside.split(chunk):
                round_rows(part, w_NK[part].expand(count, -1, -1))
            continue
        inside = inside[order]
        wanted_SRK = w_NK[inside].expand(count, -1, -1).clone()
        step = max(_LEAST_ROWS, -(-len(inside) // _PARTS))
        for start in range(0, len(inside), step):
            stop = min(start + step, len(inside))
            missed_SnK = round_rows(inside[start:stop], wanted_SRK[:, start:stop])
            if stop < len(inside):
                own, later = upper[start:stop, start:stop], upper[start:stop, stop:]
                share = torch.linalg.solve_triangular(own, later, upper=True).t().float()
                wanted_SRK[:, stop:] -= share @ missed_SnK


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
