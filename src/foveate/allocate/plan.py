"""allocate: the budget, the solver, the map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from foveate.allocate.inputs import levels_of_inputs
from foveate.allocate.problem import Problem, build
from foveate.allocate.solve import solve_bytes, solve_loss
from foveate.errors import BudgetError
from foveate.formats.levels import NESTED_LEVELS
from foveate.maps import Budget, PrecisionMap, Profile
from foveate.sizes import format_bytes

INPUT_CHOICE = (4, 8, 16)
_ROUNDS = 8  # in practice two: inputs lose little beside weights


def allocate(
    profile: Profile,
    budget: Budget,
    *,
    levels: Sequence[int] = NESTED_LEVELS,
    per_tile: bool = True,
    tie: Sequence[Sequence[str]] = (),
    input_level: int | None = None,
    input_bits: float | None = None,
    input_levels: Sequence[int] = INPUT_CHOICE,
) -> PrecisionMap:
    """Choose the level of every weight, or of every strip of its tiles, under a budget.

    Args:
        profile: what `foveate.quantize` measured.
        budget: bytes, bits or loss.
        levels: the levels to choose among; add 0 to let tiles be dropped.
        per_tile: whether tiles may differ within a weight, each strip of 16 rows with a level of its own.
        tie: groups of shell patterns; the weights a group names get one level. `[("*.q_proj:weight",
            "*.k_proj:weight")]`.
        input_level: the level of every input, 4, 8, 16 or 32; chosen by its weight's level if not given.
        input_bits: the most bits that inputs average, over the values products read; each gets the level that loses
            least within that, by what the profile measured (or see `foveate.by_variance`). On a CPU, levels under 8
            save no time.
        input_levels: the levels to choose among for that.

    Returns:
        A map within the budget: everything is counted, scales, embeddings, index and what is not quantized.

    Raises:
        BudgetError: no map meets the budget; the message says the least possible. Or the profile does not say what
            inputs cost, or `input_levels` were given without `input_bits`.
        LevelError: `input_level` is none.
        SiteError: a pattern in `tie` names no weight.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget (={budget!r}) is not a Budget, such as Budget(bits=4.25)")
    if input_bits is None and tuple(input_levels) != INPUT_CHOICE:
        raise BudgetError("input_levels are what input_bits chooses among: give input_bits too, or input_level")
    problem = build(profile, levels, per_tile, tie, levels_of_inputs(profile, input_level, input_bits, input_levels))
    lowest = problem.to_map(torch.zeros(len(problem.loss_UL), dtype=torch.long))
    tiles_at_least = float(problem.cost_UL[:, 0].sum())
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
        # bytes are whole: a map's own bits, given back as a budget, must not fail by the last place of a float
        fixed = lowest.bytes_stored - lowest.other_bytes - tiles_at_least
        room = math.floor(budget.bits * weights / 8 + 1e-6) - fixed
        note = (
            f"no map averages {budget.bits:g} bits a weight: "
            f"the least possible is {lowest.bits:.4f} (scales and padding count)"
        )
    return problem.to_map(solve_bytes(problem, room, note))


def _within_loss(problem: Problem, limit: float) -> PrecisionMap:
    """The cheapest map whose weights and inputs together lose at most `limit`.

    What inputs lose may hang on their weights' levels, so it is taken from the limit as the last map has it, until a
    map is within.
    """
    best = problem.to_map(torch.full((len(problem.loss_UL),), len(problem.levels) - 1))
    inputs = problem.profile.predict_inputs(best.levels)
    if inputs > limit:
        raise BudgetError(f"no map loses as little as {limit:g}: inputs at these levels alone lose {inputs:g}")
    for _ in range(_ROUNDS):
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
