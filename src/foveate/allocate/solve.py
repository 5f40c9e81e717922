"""The solver: a Lagrangian over convex hulls, then the rest of the budget spent greedily.

Each unit's levels are first reduced to the lower convex hull of (bytes, loss), so that the gain per byte falls from
step to step. Taking the steps of all units in the order of gain per byte is then optimal for every budget that a prefix
of this order meets exactly (Everett 1963; Shoham and Gersho 1988 for bit allocation). The rest of the budget is spent
on the best single steps that still fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.allocate.problem import Choices
from foveate.errors import BudgetError


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps of units to higher levels, sorted by gain per byte, the best first.

    Attributes:
        unit, level: int64 [S], the unit and the index in `Choices.levels` that it moves to.
        cost, gain: float64 [S], the bytes added and the loss removed.
    """

    unit: Tensor
    level: Tensor
    cost: Tensor
    gain: Tensor


def ordered_steps(problem: Choices) -> Steps:
    """The steps of all units along their convex hulls, from the cheapest level up, sorted by gain per byte."""
    loss, cost = problem.loss_UL, problem.cost_UL
    units, count = loss.shape
    at = torch.zeros(units, dtype=torch.long)
    all_units = torch.arange(units)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(count - 1):
        # the next hull vertex is the level with the best gain per byte; among equals the highest
        gain = loss[all_units, at][:, None] - loss
        added = cost - cost[all_units, at][:, None]
        ahead = torch.arange(count) > at[:, None]
        rate = torch.where(ahead & (gain > 0), gain / added.clamp_min(1e-9), -1.0)
        best, _ = rate.max(1)
        level = count - 1 - (rate.flip(1) == best[:, None]).long().argmax(1)
        moving = best > 0
        if not bool(moving.any()):
            break
        who = all_units[moving]
        parts.append((who, level[moving], added[who, level[moving]], gain[who, level[moving]]))
        at = torch.where(moving, level, at)
    if not parts:
        empty = torch.empty(0, dtype=torch.long)
        return Steps(empty, empty, empty.double(), empty.double())
    unit, level, added, gain = (torch.cat(column) for column in zip(*parts, strict=True))
    # the gain per byte falls along a unit's hull, so a stable sort keeps its steps in order
    order = torch.sort(gain / added, descending=True, stable=True).indices
    return Steps(unit[order], level[order], added[order], gain[order])


def take(problem: Choices, steps: Steps, count: int) -> Tensor:
    """The choice after the first `count` steps: int64 [U]."""
    choice = torch.zeros(len(problem.loss_UL), dtype=torch.long)
    return choice.scatter_reduce(0, steps.unit[:count], steps.level[:count], "amax")


def _spend(problem: Choices, choice: Tensor, room: float) -> Tensor:
    """Spend the rest of a byte budget on single steps that fit, the best gain per byte first."""
    loss, cost = problem.loss_UL, problem.cost_UL
    all_units = torch.arange(len(loss))
    while True:
        gain = loss[all_units, choice][:, None] - loss
        added = cost - cost[all_units, choice][:, None]
        fits = (added > 0) & (added <= room) & (gain > 0)
        if not bool(fits.any()):
            return choice
        rate = torch.where(fits, gain / added.clamp_min(1e-9), -1.0)
        best, level = rate.max(1)
        order = torch.sort(best, descending=True, stable=True).indices[:1024]
        choice = choice.clone()
        for unit in order.tolist():
            step = int(level[unit])
            if best[unit] > 0 and float(added[unit, step]) <= room:
                choice[unit] = step
                room -= float(added[unit, step])


def solve_bytes(problem: Choices, room: float, least_note: str) -> Tensor:
    """The least loss within `room` bytes of planes and scales."""
    base = float(problem.cost_UL[:, 0].sum())
    if base > room:
        raise BudgetError(least_note)
    steps = ordered_steps(problem)
    count = int((steps.cost.cumsum(0) <= room - base).sum())
    choice = take(problem, steps, count)
    spent = _spend(problem, choice, room - base - float(steps.cost[:count].sum()))
    # with few units, one level for all may use the budget better than the steps along the hull
    uniform = [torch.full_like(spent, i) for i, cost in enumerate(problem.cost_UL.sum(0).tolist()) if cost <= room]
    return min([spent, *uniform], key=lambda c: float(problem.loss_UL.gather(1, c[:, None]).sum()))


def _predicted_gain(predicted_UL: Tensor, steps: Steps) -> Tensor:
    """The predicted loss that each step removes, float64 [S]."""
    order = torch.sort(steps.unit, stable=True).indices
    unit, level = steps.unit[order], steps.level[order]
    before = torch.cat([level.new_zeros(1), level[:-1]])[: len(level)]
    first = torch.cat([unit.new_full((1,), -1), unit[:-1]])[: len(unit)] != unit
    before = torch.where(first, 0, before)
    gain = torch.empty(len(order), dtype=torch.float64)
    gain[order] = predicted_UL[unit, before] - predicted_UL[unit, level]
    return gain


def solve_loss(problem: Choices, limit: float, inputs: float = 0.0) -> Tensor:
    """The fewest bytes whose predicted loss, together with the loss `inputs` of all inputs, is at most `limit`."""
    steps = ordered_steps(problem)
    predicted = problem.predicted_UL
    start = float(predicted[:, 0].sum())
    least = float(predicted.min(1).values.sum())
    limit *= 1 + 1e-9  # the loss of an existing map, given as a limit, must not fail by rounding
    limit -= inputs
    if least > limit:
        total = limit + inputs
        raise BudgetError(f"no map loses as little as {total:g}: the least predicted loss is {least + inputs:g}")
    if start <= limit:
        return take(problem, steps, 0)
    end = take(problem, steps, len(steps.unit))
    reached = float(predicted.gather(1, end[:, None]).sum())
    if reached > limit:  # steps skip levels without gain, but their predicted loss may be lower
        choice, taken = predicted.argmin(1), least
    else:
        gain = _predicted_gain(predicted, steps)
        left = reached + gain.flip(0).cumsum(0).flip(0) - gain  # summed from the end, where the loss is least
        count = int((left > limit).nonzero().max()) + 2 if bool((left > limit).any()) else 1
        choice, taken = take(problem, steps, count), float(left[count - 1])
    # the last step may have overshot: undo steps that are not needed, the most bytes for their loss first
    slack = limit - taken
    loss, cost = predicted, problem.cost_UL
    all_units = torch.arange(len(loss))
    # a level that loses more than a lower one counts as that one (problem.build), so the lower one is read
    lowest = (problem.loss_UL[:, :, None] == problem.loss_UL[:, None, :]).int().argmax(2)
    below = lowest[all_units, (choice - 1).clamp_min(0)]
    rise = loss[all_units, below] - loss[all_units, choice]
    saved = cost[all_units, choice] - cost[all_units, below]
    for unit in torch.sort(saved / rise.clamp_min(1e-30), descending=True, stable=True).indices[:4096].tolist():
        if saved[unit] > 0 and float(rise[unit]) <= slack:
            choice[unit] = below[unit]
            slack -= float(rise[unit])
    return choice
