"""The frontier: a nested chain of maps from the best to the cheapest.

A step moves one unit (a tile, a strip of 16 rows, a weight, or tied weights) to a lower level. The steps of all units
are sorted by the loss that they add for what they save: bytes of memory, or with timings the seconds of a token. The
maps are the prefixes of this one sequence at evenly spaced costs, so each is nested in the one before.
"""

from __future__ import annotations

import torch

from foveate.allocate.constraints import DEFAULT_CONSTRAINTS, Constraints, check_constraints
from foveate.allocate.inputs import levels_of_inputs
from foveate.allocate.problem import build
from foveate.allocate.solve import ordered_steps, take
from foveate.errors import BudgetError
from foveate.precision.frontiers import MOST_MAPS, Frontier
from foveate.precision.profiles import Profile
from foveate.precision.timings import Timings


def frontier(
    profile: Profile,
    points: int = 16,
    constraints: Constraints = DEFAULT_CONSTRAINTS,
    *,
    timings: Timings | None = None,
) -> Frontier:
    """A chain of at most `points` maps, evenly spread over bytes, or over time.

    The maps are prefixes of one sequence of steps, so they are nested: no tile has a higher level in a cheaper map.

        chain = fv.frontier(profile, 8, fv.Constraints(input_bits=6.0))
        chain = fv.frontier(profile, 64, timings=profile.timings)

    Args:
        profile: what `foveate.quantize` measured.
        points: the largest number of maps, 2 to 255.
        constraints: what every map must keep to, as for `foveate.allocate`.
        timings: order the steps by the seconds that they save in place of bytes. Weights that a token hardly reads,
            such as an embedding's, then keep their bits longest (docs/decisions.md says what this gains).

    Raises:
        BudgetError: there are too few points or too many, `constraints` are no `Constraints`, the profile has no losses
            of inputs, or a level was not timed.
        SiteError: a pattern of `constraints.tie` names no weight, or a weight was not timed.
    """
    if not 2 <= points <= MOST_MAPS:
        raise BudgetError(f"points (={points}) must be at least 2 and at most {MOST_MAPS}")
    check_constraints(constraints)
    problem = build(profile, constraints, levels_of_inputs(profile, constraints), timings)
    steps = ordered_steps(problem)
    spent = steps.cost.cumsum(0)
    total = float(spent[-1]) if len(spent) else 0.0
    targets = torch.linspace(total, 0, points, dtype=torch.float64)
    # half a byte, or as small a part of the time, for errors of rounding in the sums
    slack = 0.5 if timings is None else total * 1e-12
    counts = [int((spent <= target + slack).sum()) for target in targets.tolist()]
    return Frontier(tuple(problem.to_map(take(problem, steps, count)) for count in dict.fromkeys(counts)))
