"""Choose codes by what they cost the model's output: first by error feedback, then by coordinate descent.

The error of a layer is dW x. Where inputs are correlated, other weights of a row can compensate what the rounding of
one weight does wrong, and other rows can compensate what one row does wrong to the output. To second order a change dW
costs 1/2 E[(g^T dW x)^2]. Where the gradients g of the outputs and the inputs x are independent, that is

    1/2 tr(G dW H dW^T)        G = E[g g^T], H = E[x x^T]

(K-FAC: Martens and Grosse, arXiv:1503.05671). Error feedback minimizes it greedily, in one pass that hands each error
on to the weights that are still to come: along columns (GPTQ: Frantar et al., arXiv:2210.17323), and along rows too
(YAQA: Tseng et al., arXiv:2505.22988). Coordinate descent then goes over all weights several times and chooses each
code with all others as they are (QuantEase: Behdin et al., arXiv:2309.01885, for columns and one level). Columns go in
the order of their inputs' energy, the greatest first, so that the most columns are left to compensate the costliest
errors.

A nested code is read at five levels, and each level makes an error of its own. So the code with the least sum over all
levels is chosen, weighted by `LEVEL_WEIGHTS`. Each level has an error stream of its own, which its own errors
compensate. The loops are ops, whose reference has the formulae (`foveate.kernels.rounding.reference`).

G is kept in blocks of at most 512 rows (`foveate.collect.statistics`); rows of different blocks do not compensate each
other. docs/decisions.md has the measurements behind the numbers here.
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
LEVEL_WEIGHTS: Mapping[int, float] = {2: 1 / 24, 3: 1 / 3, 4: 1.3, 6: 2.0, 8: 6.0}
#: The same for a weight that is also an embedding. Nothing compensates the errors of rows that are looked up, and
#: allocation gives such rows many bits.
LEVEL_WEIGHTS_LOOKED_UP: Mapping[int, float] = {**LEVEL_WEIGHTS, 6: 4.0, 8: 96.0}
#: The reach of residuals where descent chooses the 4-bit codes, often not the nearest ones: a step of the anchor is 12
#: steps of the residual, which has 16 values (`foveate.formats.levels.ANCHOR_STEPS`).
FITTED_REACH = 3
#: Degrees of freedom per row (d/n) up to which all levels trust H, and from which 6 and 8 bits do not trust it.
_DOF_LIMITS = (0.18, 0.32)
#: With this many samples the correlation of the rows within a sample counts as much as the number of rows does.
_SAMPLES_HALF = 300
#: The damping of an H that is not trusted at 6 and 8 bits.
_FEW_SAMPLES_DAMPING = 1.0
#: How often coordinate descent goes over all codes at most. A block of rows is left after a sweep that took less than
#: this part off its loss: the sweeps behind it would together bring about two such parts.
SWEEPS, LEAST_GAIN = 10, 0.01
#: Damping, in means of the diagonal of the covariance of inputs and of gradients: it is added to the diagonal. It
#: covers directions in which calibration's inputs never varied, and gradients of which too few samples were seen.
INPUT_DAMPING, GRADIENT_DAMPING = 0.03, 0.3


def degrees_of_freedom(covariance_KK: Tensor, rows: float) -> float:
    """The effective degrees of freedom of descent for each row of input, d/n; at most 0.5.

    With damping, d = tr H (H + damping)^-1. The more degrees of freedom there are for each row that was seen, the more
    descent overfits these rows.

    Args:
        covariance_KK: E[x x^T], as `with_descent` takes it.
        rows: the number n of input rows that the covariance was taken from.
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
    """The loss of descent's codes on other inputs, over their loss on the inputs that they were chosen on.

    Descent makes dW H dW^T small for the H of the rows that were seen, and directions in which that form is small by
    chance look cheap. For a form that is minimized freely in d directions on n rows, the ratio of the two losses is
    1 / (1 - d/n)^2, as for the risk of a portfolio (Varga-Haszonits et al., arXiv:1606.08679).

    Args:
        dof_per_row: d/n (`degrees_of_freedom`).
    """
    return 1 / (1 - dof_per_row) ** 2


@dataclass(frozen=True)
class DescentConfig:
    """How far descent trusts the covariance that calibration saw.

    Attributes:
        level_weights: what a squared error costs at each level.
        clip_penalties: what a squared error costs at 6 and 8 bits in the search for the grids that descent starts from.
        damping: damping of the inputs' covariance, in means of its diagonal.
        reach: of the residuals.
    """

    level_weights: Mapping[int, float]
    clip_penalties: tuple[float, float]
    damping: float
    reach: int


def descent_config(dof_per_row: float, samples: float) -> DescentConfig:
    """The configuration of descent for a covariance of some rows, taken from some independent samples.

    Where few rows were seen, part of what descent gains at 4 bits and below also holds on other inputs. At 8 bits
    nearest codes leave hardly any error, and overfitting loses more than that. So with few rows the covariance is
    damped more, and 6 and 8 bits weigh more, up to their weight for nearest codes. Codes that are nearly those need no
    residuals that reach further.

    Args:
        dof_per_row: d/n (`degrees_of_freedom`).
        samples: tokens of a language model, sentences of an encoder, or images. Rows of one sample are correlated.
    """
    low, high = _DOF_LIMITS
    dof_per_row *= 1 + _SAMPLES_HALF / max(samples, 1)
    fewness = min(max(math.log(max(dof_per_row, low) / low) / math.log(high / low), 0.0), 1.0)

    def between(many: float, few: float) -> float:
        return math.exp((1 - fewness) * math.log(many) + fewness * math.log(few))

    level_weights = {level: between(LEVEL_WEIGHTS[level], LEVEL_WEIGHTS_LOOKED_UP[level]) for level in LEVEL_WEIGHTS}
    (six, eight), (six_few, eight_few) = CLIP_PENALTIES_FOR_DESCENT, CLIP_PENALTIES
    return DescentConfig(
        level_weights,
        (between(six, six_few), between(eight, eight_few)),
        between(INPUT_DAMPING, _FEW_SAMPLES_DAMPING),
        FITTED_REACH if fewness < 0.5 else 0,
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
    least_gain: float = LEAST_GAIN,
    damping: float = INPUT_DAMPING,
    reach: int = 0,
) -> Rounded:
    """Codes on the same grids, chosen for the least error of the model's output over all levels.

    Args:
        w_NK: the weight, floating point [N, K].
        rounded: its grids and nearest codes (`round_weight`).
        covariance_KK: E[x x^T] of its inputs, in any unit.
        gradients_BRR: E[g g^T] of its outputs' gradients, in any unit, one block for each R rows; the padding of the
            last block may be anything. Each row is rounded by itself if it is not given, where a block is zero or not
            finite, and where no kernels are compiled (a plain loop over all elements would take hours).
        level_weights: what a squared error costs at each nested level.
        sweeps: how often descent goes over all codes, at most.
        least_gain: the part of its loss that a sweep must take off a block of rows for the next sweep to be made.
        damping: damping of the covariance, in means of its diagonal.
        reach: of the residuals.

    Returns:
        `rounded` with other codes, gains and reach; `rounded` itself if the covariance cannot be used (zero, or not
        finite).
    """
    grid = replace(rounded, reach=reach)
    codes_2NK = best_codes(w_NK, grid, covariance_KK, gradients_BRR, level_weights, (sweeps, least_gain), damping)
    if codes_2NK is None:
        return rounded
    gain = restoring_gains(w_NK, codes_2NK[0], rounded, covariance_KK.diagonal())
    return replace(grid, anchor=codes_2NK[0], residual=codes_2NK[1], gain=gain)


def best_codes(
    w_NK: Tensor,
    grid: Rounded,
    covariance_KK: Tensor,
    gradients_BRR: Tensor | None,
    level_weights: Mapping[int, float],
    until: tuple[int, float],
    damping: float = INPUT_DAMPING,
) -> Tensor | None:
    """4-bit codes and residuals, uint8 [2, N, K], on the scales, offsets and gains of `grid`.

    None where the covariance cannot be used. The arguments are those of `with_descent`; `until` has its sweeps and its
    least gain.
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
    torch.ops.foveate.error_feedback(codes_2NK, w_NK, factor_KK, row_factor_BRR, *on, grid.reach)
    torch.ops.foveate.coordinate_descent(codes_2NK, w_NK, metric_KK, together_BRR, *on, *until, grid.reach)
    found_2NK = torch.empty_like(codes_2NK)
    found_2NK[:, :, order_K] = codes_2NK
    return found_2NK


def _as_metric(covariance: Tensor, damping: float) -> Tensor | None:
    """A damped covariance whose diagonal had mean 1 before, float32; None if it cannot be used."""
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
    """Each block's metric, and its feedback factor as `error_feedback` takes it.

    The metric is the identity where a block cannot be used. Padding behind the last row does not count.
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
