"""What each tile costs at each level: the Fisher score of the error that level makes.

    S_tile(level) = 1/2 sum over the tile's weights of F_ij (w_ij - w_ij(level))^2

in the objective's unit for one sample (nats a token for a language model), so that the sum over a map's tiles predicts
its KL. See `foveate.collect.statistics` for F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.formats.levels import WEIGHT_LEVELS
from foveate.formats.packing import TILE_ROWS, tile_grid

Fisher = Tensor | tuple[Tensor, Tensor]


def tile_losses(w_NK: Tensor, at_level: Callable[[int], Tensor], fishers: Sequence[Fisher], group: int) -> Tensor:
    """Score every tile at every level.

    Args:
        w_NK: the original weight, float32.
        at_level: the weight as read at a nested level, float32 [N, K].
        fishers: F for each use of the weight (tied weights have several): [N, K], or factors ([N], [K]).
        group: inputs a tile.

    Returns:
        float32 [T, 6], tiles in order nt * G + gi, a column for each of WEIGHT_LEVELS.
    """
    columns = []
    for level in WEIGHT_LEVELS:
        error = w_NK - at_level(level) if level else w_NK.clone()
        error.square_()
        loss = sum(_row_sums(error, fisher, group) for fisher in fishers)
        columns.append(0.5 * _strip_sums(torch.as_tensor(loss)))
    return torch.stack(columns, 1).float()


def _row_sums(error_NK: Tensor, fisher: Fisher, group: int) -> Tensor:
    """The sum over each row's groups of F times the squared error, float64 [N, G]."""
    rows, columns = error_NK.shape
    groups = tile_grid(rows, columns, group)[1]
    if isinstance(fisher, tuple):
        gradient_N, energy_K = fisher
        error_NGg = F.pad(error_NK, (0, groups * group - columns)).view(rows, groups, group)
        energy_Gg = F.pad(energy_K, (0, groups * group - columns)).view(groups, group)
        return torch.einsum("ngk,gk->ng", error_NGg, energy_Gg).double() * gradient_N.double()[:, None]
    return F.pad(error_NK * fisher, (0, groups * group - columns)).view(rows, groups, group).sum(2, dtype=torch.float64)


def _strip_sums(loss_NG: Tensor) -> Tensor:
    """Sums over strips of 16 rows, flattened to tiles [T]."""
    rows, groups = loss_NG.shape
    return F.pad(loss_NG, (0, 0, 0, -rows % TILE_ROWS)).view(-1, TILE_ROWS, groups).sum(1).flatten()
