"""allocate: solve the allocation problem for a budget, and return the precision map."""

from __future__ import annotations

import math

import torch

from foveate.allocate.constraints import DEFAULT_CONSTRAINTS, Constraints, check_constraints
from foveate.allocate.inputs import levels_of_inputs
from foveate.allocate.problem import Problem, build
from foveate.allocate.solve import solve_bytes, solve_loss
from foveate.errors import BudgetError
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.sizes import format_bytes, format_seconds

_MAX_ROUNDS = 8  # two rounds are usual, since inputs lose little compared with weights


def allocate(profile: Profile, budget: Budget, constraints: Constraints = DEFAULT_CONSTRAINTS) -> PrecisionMap:
    """Choose the level of every tile, strip of tiles or weight under a budget.

        plan = fv.allocate(profile, fv.Budget(bits=4.25))
        plan = fv.allocate(profile, fv.Budget(bytes="800MiB"), fv.Constraints(levels=(2, 4, 8)))
        plan = fv.allocate(profile, fv.Budget(latency="30ms"))  # after fv.measure_timings(model, batch)

    Args:
        profile: what `foveate.quantize` measured.
        budget: bytes, bits, loss or latency.
        constraints: what else the map must keep to: levels to choose among, weights that share a level, inputs.

    Returns:
        A map within the budget. Everything counts: planes, scales, embeddings, the tile index and unquantized
        parameters.

    Raises:
        BudgetError: no map meets the budget, and the message names the least possible; or the profile has no losses of
            inputs, or no times for a budget of latency; or an argument has the wrong class.
        SiteError: a pattern of `constraints.tie` names no weight, or a weight is in two groups.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget (={budget!r}) is not a Budget, such as Budget(bits=4.25)")
    check_constraints(constraints)
    if budget.latency is not None:
        return _within_latency(profile, float(budget.latency), constraints)
    problem = build(profile, constraints, levels_of_inputs(profile, constraints))
    lowest = problem.to_map(torch.zeros(len(problem.loss_UL), dtype=torch.long))
    tiles_at_least = float(problem.cost_UL[:, 0].sum())
    exact_index = sum(s.exact_overhead() for s in profile.weight_sites() if profile.exact_levels(s.name) is not None)
    if budget.loss is not None:
        return _within_loss(problem, budget.loss)
    if budget.bytes is not None:
        assert isinstance(budget.bytes, int)
        room = budget.bytes - (lowest.bytes_resident - tiles_at_least)
        least = lowest.bytes_resident
        note = f"no map fits in {format_bytes(budget.bytes)}: the least is {format_bytes(least)} ({least} bytes)"
    else:
        assert budget.bits is not None
        weights = sum(s.weights for s in profile.weight_sites())
        # the bits of an existing map, given as a budget, must not fail by a rounding error; bytes are whole numbers
        fixed = lowest.bytes_stored - lowest.other_bytes - tiles_at_least
        room = math.floor(budget.bits * weights / 8 + 1e-6) - fixed
        note = (
            f"no map averages {budget.bits:g} bits a weight: "
            f"the least possible is {lowest.bits:.4f} (scales and padding count)"
        )
    plan = problem.to_map(solve_bytes(problem, room, note))
    if budget.bytes is not None and plan.bytes_resident > budget.bytes:  # by the index of exact tiles
        return problem.to_map(solve_bytes(problem, max(room - exact_index, tiles_at_least), note))
    return plan


def _within_latency(profile: Profile, limit: float, constraints: Constraints) -> PrecisionMap:
    """The map of least loss whose token or sample takes at most `limit` seconds by the profile's timings."""
    timings = profile.timings
    if timings is None:
        raise BudgetError(
            "the profile has no times: foveate.measure_timings(model, batch) measures them on this machine"
        )
    problem = build(profile, constraints, levels_of_inputs(profile, constraints), timings)
    least = timings.rest + float(problem.cost_UL[:, 0].sum())
    note = (
        f"no map takes as little as {format_seconds(limit)}: the least is {format_seconds(least)}, of which "
        f"{format_seconds(timings.rest)} are not products"
    )
    # the time of an existing map, given as a budget, must not fail by a rounding error
    return problem.to_map(solve_bytes(problem, limit * (1 + 1e-9) - timings.rest, note))


def _within_loss(problem: Problem, limit: float) -> PrecisionMap:
    """The cheapest map whose weights and inputs together lose at most `limit`.

    The loss of inputs can depend on the levels of weights. Each round therefore reserves the inputs' loss of the last
    map, until a map is within the limit.
    """
    best = problem.to_map(torch.full((len(problem.loss_UL),), len(problem.levels) - 1))
    inputs = problem.profile.predict_inputs(best.levels)
    if inputs > limit:
        raise BudgetError(f"no map loses as little as {limit:g}: inputs at these levels alone lose {inputs:g}")
    for _ in range(_MAX_ROUNDS):
        plan = problem.to_map(solve_loss(problem, limit, inputs))
        if plan.predicted_loss <= limit * (1 + 1e-6):
            return plan
        more = problem.profile.predict_inputs(plan.levels)
        try:
            solve_loss(problem, limit, more)
        except BudgetError:
            break
        inputs = more
    return best
