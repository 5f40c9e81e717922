"""What each tile costs at each level: the Fisher score of the error that level makes.

    S_tile(level) = 1/2 sum over the tile's weights of F_ij (w_ij - w_ij(level))^2

in the objective's unit for one sample (nats a token for a language model), so that the sum over a map's tiles predicts
its KL. See `foveate.collect.statistics` for F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveate.formats.levels import WEIGHT_LEVELS
from foveate.formats.packing import matrix_to_tiles

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
        error = (w_NK - at_level(level)).square_() if level else w_NK.square()
        loss = torch.zeros_like(error)
        for fisher in fishers:
            if isinstance(fisher, tuple):
                loss += error * fisher[0][:, None] * fisher[1]
            else:
                loss += error * fisher
        columns.append(0.5 * matrix_to_tiles(loss, group).sum((2, 3), dtype=torch.float64).flatten())
    return torch.stack(columns, 1).float()
