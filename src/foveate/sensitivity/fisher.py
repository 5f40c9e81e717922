"""What each tile costs at each level: the error of that level, weighted by the Fisher information.

    S_tile(level) = 1/2 sum over the tile's weights of F_ij (w_ij - w_ij(level))^2

S is in the objective's unit for one sample (nats for each token of a language model), so the sum over the tiles of a
map predicts its KL divergence. `foveate.collect.statistics` explains F.

Rounding by descent makes errors that cancel each other, which a sum of squares does not see. So where the covariance H
of the inputs is known, the groups of each row are scaled by dW_i H dW_i^T / dW_i diag(H) dW_i^T. Where F has factors,
the sum of the groups is then the row's whole quadratic form. Rows that compensate each other's errors are scaled by
tr(G dW H dW^T) over its diagonal part, where the covariance G of the outputs' gradients is known.

The errors cancel on the inputs that calibration saw. On other inputs they cancel less, by a factor that is known where
codes were fitted (`foveate.rounding.overfit_factor`). At worst the errors are uncorrelated there, so the factor raises
no row's scale above 1. A use of the weight without a covariance was not fitted to, and is not raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.collect.statistics import Factored
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.formats.packing import TILE_ROWS, tile_grid

Fisher = Tensor | Factored


def tile_losses(
    w_NK: Tensor,
    at_level: Callable[[int], Tensor],
    fishers: Sequence[Fisher],
    group: int,
    covariances: Sequence[Tensor | None] = (),
    gradients: Sequence[Tensor | None] = (),
    overfit: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Score every tile at every level, on other inputs than those that calibration saw.

    Args:
        w_NK: the original weight, float32.
        at_level: the weight as read at a nested level, float32 [N, K].
        fishers: F for each use of the weight (tied weights have several): [N, K], or its factors.
        group: inputs a tile.
        covariances: for each use E[x x^T] of its inputs, [K, K], where known; none if empty.
        gradients: for each use E[g g^T] of each R rows, [B, R, R], where known; none if empty.
        overfit: the loss of fitted codes on other inputs over their loss on the inputs that were seen.

    Returns:
        (float32 [T, 6], the losses on other inputs, tiles in the order nt * G + gi and a column for each of
        WEIGHT_LEVELS; float64 [6], the sums over tiles on the inputs that were seen).
    """
    columns, seen = [], []
    for level in WEIGHT_LEVELS:
        error_NK = w_NK - at_level(level) if level else w_NK.clone()
        uses = zip(fishers, covariances or [None] * len(fishers), gradients or [None] * len(fishers), strict=True)
        parts = []
        total = torch.zeros((), dtype=torch.float64)
        for fisher, covariance_KK, gradients_BRR in uses:
            losses_NG = _row_sums(error_NK, fisher, group)
            if covariance_KK is not None:
                scale_N = _covariance_ratio(error_NK, covariance_KK, gradients_BRR)
                total += 0.5 * (losses_NG * scale_N[:, None]).sum()
                losses_NG = losses_NG * torch.maximum(scale_N, (scale_N * overfit).clamp(max=1.0))[:, None]
            else:
                total += 0.5 * losses_NG.sum()
            parts.append(_strip_sums(losses_NG))
        columns.append(0.5 * torch.stack(parts).sum(0))
        seen.append(total)
    return torch.stack(columns, 1).float(), torch.stack(seen)


def _row_sums(error_NK: Tensor, fisher: Fisher, group: int) -> Tensor:
    """The sum over each row's groups of F times the squared error, float64 [N, G]."""
    rows, columns = error_NK.shape
    groups = tile_grid(rows, columns, group)[1]

    def grouped(t: Tensor) -> Tensor:
        return F.pad(t, (0, groups * group - columns)).view(*t.shape[:-1], groups, group)

    squares_NK = error_NK.square()
    if isinstance(fisher, Tensor):
        losses_NG = grouped(squares_NK * fisher).sum(2, dtype=torch.float64)
    else:
        energies_NG = torch.einsum("ngk,gk->ng", grouped(squares_NK), grouped(fisher.energy_K)).double()
        losses_NG = energies_NG * fisher.gradient_N.double()[:, None]
    return losses_NG


def _covariance_ratio(error_NK: Tensor, covariance_KK: Tensor, gradients_BRR: Tensor | None) -> Tensor:
    """The cost of each row's errors over their cost if inputs were uncorrelated, float64 [N]."""
    seen_NK = error_NK @ covariance_KK
    correlated_N = (seen_NK * error_NK).sum(1, dtype=torch.float64).clamp_min(0)
    uncorrelated_N = (error_NK.square() @ covariance_KK.diagonal()).double().clamp_min(torch.finfo(torch.float64).tiny)
    scale_N = correlated_N / uncorrelated_N
    return scale_N if gradients_BRR is None else scale_N * _gradient_ratio(error_NK, seen_NK, gradients_BRR)


def _gradient_ratio(error_NK: Tensor, seen_NK: Tensor, gradients_BRR: Tensor) -> Tensor:
    """tr(G dW H dW^T) over its diagonal part, for the rows of each block of G, float64 [N]."""
    size = gradients_BRR.shape[1]
    ratios = []
    for error, seen, gradients in zip(error_NK.split(size), seen_NK.split(size), gradients_BRR, strict=True):
        form = (seen @ error.t()).mul_(gradients[: len(error), : len(error)]).double()
        alone = form.diagonal().sum()
        ratio = form.sum().clamp_min(0) / alone if float(alone) > 0 else torch.ones((), dtype=torch.float64)
        ratios.append(ratio.expand(len(error)))
    return torch.cat(ratios)


def _strip_sums(loss_NG: Tensor) -> Tensor:
    """Sums over strips of 16 rows, flattened to tiles [T]."""
    rows, groups = loss_NG.shape
    return F.pad(loss_NG, (0, 0, 0, -rows % TILE_ROWS)).view(-1, TILE_ROWS, groups).sum(1).flatten()
