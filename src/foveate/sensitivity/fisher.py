"""What each tile costs at each level: the Fisher score of the error that level makes.

    S_tile(level) = 1/2 sum over the tile's weights of F_ij (w_ij - w_ij(level))^2

in the objective's unit for one sample (nats a token for a language model), so that the sum over a map's tiles predicts
its KL. See `foveate.collect.statistics` for F. Rounding by descent makes errors that cancel each other, which
a sum of squares does not see. So where the covariance H of the inputs is known, the groups of each row are scaled
together by dW_i H dW_i^T / dW_i diag(H) dW_i^T. Where F has factors, their sum is then the row's whole quadratic form.
Rows that make up for each other's errors are scaled in the same way, by tr(G dW H dW^T) over what its diagonal says,
where the covariance G of the outputs' gradients is known.
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
) -> Tensor:
    """Score every tile at every level.

    Args:
        w_NK: the original weight, float32.
        at_level: the weight as read at a nested level, float32 [N, K].
        fishers: F for each use of the weight (tied weights have several): [N, K], or its factors.
        group: inputs a tile.
        covariances: for each use E[x x^T] of its inputs, [K, K], where known; none if empty.
        gradients: for each use E[g g^T] of each R rows, [B, R, R], where known; none if empty.

    Returns:
        float32 [T, 6], tiles in order nt * G + gi, a column for each of WEIGHT_LEVELS.
    """
    columns = []
    for level in WEIGHT_LEVELS:
        error_NK = w_NK - at_level(level) if level else w_NK.clone()
        parts = [
            _strip_sums(_row_sums(error_NK, fisher, group, covariance_KK, gradients_BRR))
            for fisher, covariance_KK, gradients_BRR in zip(
                fishers, covariances or [None] * len(fishers), gradients or [None] * len(fishers), strict=True
            )
        ]
        columns.append(0.5 * torch.stack(parts).sum(0))
    return torch.stack(columns, 1).float()


def _row_sums(
    error_NK: Tensor, fisher: Fisher, group: int, covariance_KK: Tensor | None, gradients_BRR: Tensor | None
) -> Tensor:
    """The sum over each row's groups of F times the squared error, float64 [N, G], scaled by what cancels."""
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
    if covariance_KK is not None:
        seen_NK = error_NK @ covariance_KK
        together_N = (seen_NK * error_NK).sum(1, dtype=torch.float64).clamp_min(0)
        apart_N = (squares_NK @ covariance_KK.diagonal()).double().clamp_min(torch.finfo(torch.float64).tiny)
        losses_NG = losses_NG * (together_N / apart_N)[:, None]
        if gradients_BRR is not None:
            losses_NG = losses_NG * _made_up_for(error_NK, seen_NK, gradients_BRR)[:, None]
    return losses_NG


def _made_up_for(error_NK: Tensor, seen_NK: Tensor, gradients_BRR: Tensor) -> Tensor:
    """tr(G dW H dW^T) over its diagonal's part, for the rows of each block of G: float64 [N]."""
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
