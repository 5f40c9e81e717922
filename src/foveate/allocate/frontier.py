"""The frontier: a chain of maps from the best to the cheapest.

Each step along the chain is the one that adds the least loss for each byte that it saves.
"""

from __future__ import annotations

import torch

from foveate.allocate.constraints import DEFAULT_CONSTRAINTS, Constraints, check_constraints
from foveate.allocate.inputs import levels_of_inputs
from foveate.allocate.problem import build
from foveate.allocate.solve import ordered_steps, take
from foveate.errors import BudgetError
from foveate.precision.frontiers import Frontier
from foveate.precision.profiles import Profile


def frontier(profile: Profile, points: int = 16, constraints: Constraints = DEFAULT_CONSTRAINTS) -> Frontier:
    """A chain of at most `points` maps, evenly spread over bytes.

    The maps are prefixes of one sequence of steps, so they are nested: no tile has a higher level in a cheaper map.

        chain = fv.frontier(profile, 8, fv.Constraints(input_bits=6.0))

    Args:
        profile: what `foveate.quantize` measured.
        points: the largest number of maps, at least 2.
        constraints: what every map must keep to, as for `foveate.allocate`.

    Raises:
        BudgetError: there are too few points, `constraints` are no `Constraints`, or the profile has no losses of
            inputs.
        SiteError: a pattern of `constraints.tie` names no weight.
    """
    if points < 2:
        raise BudgetError(f"points (={points}) must be at least 2")
    check_constraints(constraints)
    problem = build(profile, constraints, levels_of_inputs(profile, constraints))
    steps = ordered_steps(problem)
    spent = steps.cost.cumsum(0)
    total = float(spent[-1]) if len(spent) else 0.0
    targets = torch.linspace(total, 0, points, dtype=torch.float64)
    counts = [int((spent <= target + 0.5).sum()) for target in targets.tolist()]
    return Frontier(tuple(problem.to_map(take(problem, steps, count)) for count in dict.fromkeys(counts)))
