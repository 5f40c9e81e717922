"""Data that inputs choose on, and options of choosing."""

from __future__ import annotations

from torch import Tensor

import foveate as fv
from tiny import rows

QUIET = fv.AdaptOptions(verdict=False)


def data(seed: int = 5) -> list[Tensor]:
    return rows(128, 96, 4, seed=seed)
