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
all levels, weighted by `LEVEL_WEIGHTS`: one code for all of them, and each level's errors are made up for by its own.
The loops are in ops, whose reference has the formulae (`foveate.kernels.rounding.reference`).

G is kept for some hundred rows at a time (`foveate.collect.statistics`); rows that are further apart do not help each
other. docs/decisions.md has the figures behind the numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.formats.levels import NESTED_LEVELS
from foveate.kernels.backends.table import ensure_loaded
from foveate.rounding.nearest import CLIP_PENALTIES, CLIP_PENALTIES_FOR_DESCENT, Rounded, restoring_gains

#: What a squared error costs at each level.
LEVEL_WEIGHTS: Mapping[int, float] = {2: 1 / 24, 3: 1 / 3, 4: 1.3, 6: 1.0, 8: 4.0}
#: The same for a weight that is also an embedding: nothing makes up for the errors of rows that are looked up, and
#: allocation gives them many bits.
LEVEL_WEIGHTS_LOOKED_UP: Mapping[int, float] = {**LEVEL_WEIGHTS, 6: 4.0, 8: 96.0}
#: Freedom (d/n) up to which H is believed at all levels, and from which it is not at 6 and 8 bits; how many samples it
#: takes until what the rows of one have in common weighs no more than that there are few rows; and the damping of few.
_DOF_LIMITS = (0.18, 0.32)
_SAMPLES_HALF = 300
_FEW_SAMPLES_DAMPING = 1.0
#: How often all codes are gone through.
SWEEPS = 10
#: Of the mean of a covariance's diagonal, added to the diagonal: against what calibration never varied of the inputs,
#: and what it saw too little of in gradients, which may be of no more than there are samples.
INPUT_DAMPING, GRADIENT_DAMPING = 0.03, 0.3


def degrees_of_freedom(covariance_KK: Tensor, rows: float) -> float:
    """Of the rows that inputs were seen in, the share that descent has directions to fit to them; at most a half.

    As many as damping leaves, tr H (H + damping)^-1, over the rows. It is what decides how far H can be believed.

    Args:
        covariance_KK: E[x x^T], as `with_descent` takes it.
        rows: of how many.
    """
    metric_KK = _as_metric(covariance_KK, INPUT_DAMPING)
    if metric_KK is None:
        return 0.0
    lower_KK, failed = torch.linalg.cholesky_ex(metric_KK)
    if int(failed):
        return 0.0
    left = float(torch.cholesky_inverse(lower_KK).diagonal().double().sum())
    return min(max(len(metric_KK) - INPUT_DAMPING * left, 0.0) / rows, 0.5)


def overfit_factor(dof_per_row: float) -> float:
    """What codes that were chosen by descent lose on other inputs, over what they lose on those they were chosen on.

    dW H dW^T is made small on the H of some rows, and directions in which that is small by chance look cheap. For a
    form that is minimized freely in d directions on n rows the two differ by 1 / (1 - d/n)^2, as the risk of a
    portfolio does (Varga-Haszonits et al., arXiv:1606.08679).

    Args:
        dof_per_row: d/n (`degrees_of_freedom`).
    """
    return 1 / (1 - dof_per_row) ** 2


@dataclass(frozen=True)
class DescentConfig:
    """How far descent goes by what calibration saw.

    Attributes:
        level_weights: what an error costs at each level.
        prices: what it costs at 6 and 8 bits for the grids that descent starts from.
        damping: of the inputs' covariance, in means of its diagonal.
    """

    level_weights: Mapping[int, float]
    clip_penalties: tuple[float, float]
    damping: float


def descent_config(dof_per_row: float, samples: float) -> DescentConfig:
    """How far descent should go by a covariance of so many rows, of so many independent samples.

    Where few were seen, fewness of what descent gains at 4 bits and below is still there on others, but at 8 bits, where
    nearest codes leave hardly any error, fitting loses more than there was. So there the covariance is damped more, and
    6 and 8 bits weigh more, up to what they do for nearest codes.

    Args:
        dof_per_row: d/n (`degrees_of_freedom`).
        samples: tokens of a language model, sentences of an encoder, images: rows of one have much in common.
    """
    low, high = _DOF_LIMITS
    dof_per_row *= 1 + _SAMPLES_HALF / max(samples, 1)
    fewness = min(max(math.log(max(dof_per_row, low) / low) / math.log(high / low), 0.0), 1.0)

    def between(many: float, few: float) -> float:
        return math.exp((1 - fewness) * math.log(many) + fewness * math.log(few))

    level_weights = {level: between(LEVEL_WEIGHTS[level], LEVEL_WEIGHTS_LOOKED_UP[level]) for level in LEVEL_WEIGHTS}
    (six, eight), (six_few, eight_few) = CLIP_PENALTIES_FOR_DESCENT, CLIP_PENALTIES
    return DescentConfig(
        level_weights, (between(six, six_few), between(eight, eight_few)), between(INPUT_DAMPING, _FEW_SAMPLES_DAMPING)
    )


@torch.no_grad()
def with_descent(
    w_NK: Tensor,
    rounded: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None = None,
    *,
    level_weights: Mapping[int, float] = LEVEL_WEIGHTS,
    sweeps: int = SWEEPS,
    damping: float = INPUT_DAMPING,
) -> Rounded:
    """The same grids with other codes, chosen for the least error of the outcome over all levels.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its grids and nearest codes (`round_weight`), of reach 0.
        covariance_KK: E[x x^T] of its inputs, in any unit.
        gradients_BRR: E[g g^T] of its outputs' gradients, in any unit, for each R rows, the last block padded with
            anything. Rows are each for themselves if it is not given, where it is of no use, and where no kernels are
            compiled (a plain loop over all elements would take hours).
        level_weights: what an error costs at each nested level.
        sweeps: how often all codes are gone through.
        damping: of the covariance, in means of its diagonal.

    Returns:
        `rounded` with other codes and gains; `rounded` itself if the covariance is of no use (zero, or not finite).
    """
    codes_2NK = best_codes(w_NK, rounded, covariance_KK, gradients_BRR, level_weights, sweeps, damping)
    if codes_2NK is None:
        return rounded
    gain = restoring_gains(w_NK, codes_2NK[0], rounded, covariance_KK.diagonal())
    return replace(rounded, anchor=codes_2NK[0], residual=codes_2NK[1], gain=gain)


def best_codes(
    w_NK: Tensor,
    grid: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None,
    level_weights: Mapping[int, float],
    sweeps: int,
    damping: float = INPUT_DAMPING,
) -> Tensor | None:
    """4-bit codes and residuals, uint8 [2, N, K], on the scales, offsets and gains of `grid`.

    None where the covariance is of no use. The rest is as `with_descent` has it.
    """
    metric_KK = _as_metric(covariance_KK, damping)
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
        [level_weights.get(level, 0.0) for level in NESTED_LEVELS],
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
