"""Choose codes by what the outcome loses: first by feedback, then by coordinate descent.

A layer's error is dW x, so what one weight's rounding does wrong on an input, other weights of its row can do right
wherever their inputs are correlated with it; and what one row does wrong to the outcome, other rows can. To second
order a change dW costs 1/2 E[(g^T dW x)^2], and where gradients g of the outputs and inputs x are independent that is

    1/2 tr(G dW H dW^T)        G = E[g g^T], H = E[x x^T]

(K-FAC: Martens and Grosse, arXiv:1503.05671). Error feedback minimizes it greedily, in one pass, passing errors on to
what is still to come: columns (GPTQ: Frantar et al., arXiv:2210.17323), and rows too (YAQA: Tseng et al.,
arXiv:2505.22988). Descent then goes over all weights again and again, each knowing all others as they are (QuantEase:
Behdin et al., arXiv:2309.01885, for one side and one level). Columns go in the order of their inputs' energy, the
greatest first, which leaves the most to make up for them.

A nested code is read at five levels, and each makes errors of its own. So a code is the one with the least sum over
all levels, weighted by `SHARES`: one code for all of them, and each level's errors are made up for by its own. The
loops are in ops, whose reference has the formulae (`foveate.kernels.rounding_reference`).

G is kept for some hundred rows at a time (`foveate.collect.statistics`); rows that are further apart do not help each
other. docs/decisions.md has the figures behind the numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.dispatch import ensure_loaded
from foveate.rounding.nearest import Rounded, restoring_gains

#: What a squared error costs at each level.
SHARES: Mapping[int, float] = {2: 1 / 24, 3: 1 / 3, 4: 1.3, 6: 1.0, 8: 4.0}
#: The same for a weight that is also an embedding: nothing makes up for the errors of rows that are looked up, and
#: allocation gives them many bits.
SHARES_LOOKED_UP: Mapping[int, float] = {**SHARES, 6: 4.0, 8: 96.0}
#: How often all codes are gone through.
SWEEPS = 10
#: Of the mean of a covariance's diagonal, added to the diagonal: against what calibration never varied of the inputs,
#: and what it saw too little of in gradients, which may be of no more than there are samples.
INPUT_DAMPING, GRADIENT_DAMPING = 0.03, 0.3


@torch.no_grad()
def with_descent(
    w_NK: Tensor,
    rounded: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None = None,
    *,
    shares: Mapping[int, float] = SHARES,
    sweeps: int = SWEEPS,
) -> Rounded:
    """The same grids with other codes, chosen for the least error of the outcome over all levels.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its grids and nearest codes (`round_weight`), of reach 0.
        covariance_KK: E[x x^T] of its inputs, in any unit.
        gradients_BRR: E[g g^T] of its outputs' gradients, in any unit, for each R rows, the last block padded with
            anything. Rows are each for themselves if it is not given, where it is of no use, and where no kernels are
            compiled (a plain loop over all elements would take hours).
        shares: what an error costs at each nested level.
        sweeps: how often all codes are gone through.

    Returns:
        `rounded` with other codes and gains; `rounded` itself if the covariance is of no use (zero, or not finite).
    """
    codes_2NK = best_codes(w_NK, rounded, covariance_KK, gradients_BRR, shares, sweeps)
    if codes_2NK is None:
        return rounded
    gain = restoring_gains(w_NK, codes_2NK[0], rounded, covariance_KK.diagonal())
    return replace(rounded, anchor=codes_2NK[0], residual=codes_2NK[1], gain=gain)


def best_codes(
    w_NK: Tensor,
    grid: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None,
    shares: Mapping[int, float],
    sweeps: int,
) -> Tensor | None:
    """4-bit codes and residuals, uint8 [2, N, K], on the scales, offsets and gains of `grid`.

    None where the covariance is of no use. The rest is as `with_descent` has it.
    """
    metric_KK = _as_metric(covariance_KK, INPUT_DAMPING)
    if metric_KK is None:
        return None
    order_K = torch.argsort(covariance_KK.diagonal(), descending=True, stable=True)
    metric_KK = metric_KK[order_K][:, order_K].contiguous()
    factor_KK = _feedback_factor(metric_KK)
    if factor_KK is None:
        return None
    together_BRR = row_factor_BRR = None
    compiled = ensure_loaded().isa is not None
    if gradients_BRR is not None and compiled:
        together_BRR, row_factor_BRR = _metrics(gradients_BRR, len(w_NK))
    codes_2NK = torch.stack([grid.anchor, grid.residual])[:, :, order_K]
    w_NK = w_NK.detach().float()[:, order_K].contiguous()
    on = (
        grid.scale.float().contiguous(),
        grid.offset.float().contiguous(),
        grid.gain.float().expand(2, len(w_NK)).contiguous(),
        order_K // grid.group,
        [shares.get(level, 0.0) for level in NESTED_LEVELS],
    )
    torch.ops.foveate.codes_feed(codes_2NK, w_NK, factor_KK, row_factor_BRR, *on)
    torch.ops.foveate.codes_descend(codes_2NK, w_NK, metric_KK, together_BRR, *on, sweeps)
    found_2NK = torch.empty_like(codes_2NK)
    found_2NK[:, :, order_K] = codes_2NK
    return found_2NK


def _as_metric(covariance: Tensor, damping: float) -> Tensor | None:
    """A covariance damped, its diagonal 1 in the mean, float32; None if it is of no use."""
    mean = covariance.diagonal().double().mean()
    if not bool(torch.isfinite(covariance).all()) or not float(mean) > 0:
        return None
    metric = (covariance / mean).float()
    metric.diagonal().add_(damping)
    return metric


def _feedback_factor(metric: Tensor) -> Tensor | None:
    """U_jk / U_jj, U the upper Cholesky factor of the inverse, float32; None if it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(metric.double())
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else (upper / upper.diagonal()[:, None]).float().contiguous()


def _metrics(gradients_BRR: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Each block's metric, the identity where it is of no use, and its factor of feedback as `codes_feed` takes it.

    What is behind the last row does not count.
    """
    size = gradients_BRR.shape[1]
    metric_BRR = torch.eye(size, dtype=torch.float32).repeat(len(gradients_BRR), 1, 1)
    factor_BRR = torch.zeros_like(metric_BRR)
    for number, block_RR in enumerate(gradients_BRR):
        count = min(size, rows - number * size)
        metric = _as_metric(block_RR[:count, :count], GRADIENT_DAMPING)
        factor = None if metric is None else _feedback_factor(metric)
        if metric is not None and factor is not None:
            metric_BRR[number, :count, :count] = metric
            factor_BRR[number, :count, :count] = factor.t().tril(-1)
    return metric_BRR, factor_BRR
