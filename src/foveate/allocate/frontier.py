"""The frontier: one chain of maps from the best to the cheapest, each step the one that loses least for the bytes it
frees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.allocate.inputs import levels_of_inputs
from foveate.allocate.problem import build
from foveate.allocate.solve import ordered_steps, take
from foveate.errors import BudgetError
from foveate.formats.levels import NESTED_LEVELS
from foveate.maps import Frontier, Profile


def frontier(
    profile: Profile,
    points: int = 16,
    *,
    levels: Sequence[int] = NESTED_LEVELS,
    per_tile: bool = True,
    tie: Sequence[Sequence[str]] = (),
    input_level: int | None = None,
    input_bits: float | None = None,
    input_levels: Sequence[int] = (4, 8, 16),
) -> Frontier:
    """A chain of at most `points` maps, evenly spread over bytes. Being prefixes of one order of steps they are nested:
    a cheaper map is nowhere above a dearer one.

    Arguments are those of `foveate.allocate`.
    """
    if points < 2:
        raise BudgetError(f"points (={points}) must be at least 2")
    problem = build(profile, levels, per_tile, tie, levels_of_inputs(profile, input_level, input_bits, input_levels))
    steps = ordered_steps(problem)
    spent = steps.cost.cumsum(0)
    total = float(spent[-1]) if len(spent) else 0.0
    targets = torch.linspace(total, 0, points, dtype=torch.float64)
    counts = [int((spent <= target + 0.5).sum()) for target in targets.tolist()]
    return Frontier(tuple(problem.to_map(take(problem, steps, count)) for count in dict.fromkeys(counts)))
