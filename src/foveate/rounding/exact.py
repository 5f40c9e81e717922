"""Which tiles keep their exact values beside their planes: those that lose most at few bits.

Of a weight whose codes were fitted by descent whole strips are kept. The errors of a row's tiles cancel there, and an
exact tile beside others would leave them alone with theirs (docs/decisions.md).

Weights are rounded one after another, and their float values may be freed as they are finished. So each weight keeps
more candidates than its share, and once all are rounded the best of all candidates stay.

Shapes: N rows, K inputs; T tiles, g inputs a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import BudgetError
from foveate.formats.levels import EXACT_LEVELS, WEIGHT_LEVELS
from foveate.planes import ExactTiles, PlaneTensor, exact_tiles

#: Tiles are compared by what they lose at this level: outliers lose most at few bits.
RANKED_AT = 3
#: How many times its share of tiles a weight keeps until all weights are rounded.
_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class KeepExact:
    """How many tiles keep their exact values, and as what.

    Attributes:
        share: the share of all tiles, above 0 and at most 1.
        level: 16 or 32, the bits of a value. At 16 a weight of 16 bits keeps its type, and one of float32 has the
            nearest float16 values.

    Raises:
        BudgetError: the share is not in that range, or the level is neither 16 nor 32.
    """

    share: float
    level: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise BudgetError(f"exact (={self.share!r}) is not a share of tiles, above 0 and at most 1")
        if self.level not in EXACT_LEVELS:
            raise BudgetError(f"exact level (={self.level!r}) is not one of {', '.join(map(str, EXACT_LEVELS))}")

    def candidates(
        self, w_NK: Tensor, dtype: torch.dtype, losses_T6: Tensor, group: int, together: int
    ) -> ExactTiles | None:
        """The exact values of the tiles of a weight that may stay.

        Args:
            w_NK: the weight, floating point.
            dtype: that it had.
            losses_T6: what each tile loses at each of WEIGHT_LEVELS.
            group: inputs in a group.
            together: how many consecutive tiles stay or go together.
        """
        gains = _gains(losses_T6, group, together)
        count = min(len(gains), math.ceil(_CANDIDATES * self.share * len(gains)))
        units = gains.topk(count).indices.sort().values
        tiles = (units[:, None] * together + torch.arange(together)).view(-1)
        return exact_tiles(w_NK, tiles, group, self._type(dtype))

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        if self.level == 32:
            return torch.float32
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16

    def chosen(
        self, weights: Mapping[str, PlaneTensor], losses: Mapping[str, Tensor], together: Mapping[str, int]
    ) -> dict[str, ExactTiles | None]:
        """Of all candidates those that stay, by the name of the weight.

        Args:
            weights: the weights with their candidates.
            losses: what each tile of each weight loses at each of WEIGHT_LEVELS.
            together: how many consecutive tiles of each stay or go together.
        """
        room = math.ceil(self.share * sum(len(losses[name]) for name in weights))
        kept = {name: torch.zeros(w.grid, dtype=torch.bool) for name, w in weights.items()}
        ranked = [
            (float(gain), name, unit)
            for name, w in weights.items()
            if w.exact is not None
            for unit, gain in enumerate(_gains(losses[name], w.group, together[name]).tolist())
            if bool((w.exact.tiles == unit * together[name]).any())
        ]
        for _, name, unit in sorted(ranked, key=lambda one: -one[0]):
            if room <= 0:
                break
            size = together[name]
            kept[name].view(-1)[unit * size : (unit + 1) * size] = True
            room -= size
        return {name: None if w.exact is None else w.exact.chosen(kept[name]) for name, w in weights.items()}


def _gains(losses_T6: Tensor, group: int, together: int) -> Tensor:
    """What each run of tiles loses at few bits, for each of its weights: float32 [T / together]."""
    return losses_T6[:, WEIGHT_LEVELS.index(RANKED_AT)].float().view(-1, together).mean(1) / group
