"""The solver: a Lagrangian over convex hulls, then the rest of the budget spent greedily.

Every unit's levels are first reduced to the lower convex hull of (bytes, loss): its steps then have falling gain per
byte, so taking all units' steps in order of gain per byte gives the optimum of every budget that the sorted order hits
exactly (Everett 1963; Shoham and Gersho 1988 for bit allocation). What is left below the budget is spent on the best
steps that still fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.allocate.problem import Choices
from foveate.errors import BudgetError


@dataclass(frozen=True, eq=False)
class Steps:
    """Upgrades in the order in which they are worth taking, the best gain per byte first.

    Attributes:
        unit, level: int64 [S], which unit moves to which index of `Choices.levels`.
        cost, gain: float64 [S], bytes added and loss taken away.
    """

    unit: Tensor
    level: Tensor
    cost: Tensor
    gain: Tensor


def ordered_steps(problem: Choices) -> Steps:
    """All units' hull steps from their cheapest level up, sorted by gain per byte."""
    loss, cost = problem.loss_UL, problem.cost_UL
    units, count = loss.shape
    at = torch.zeros(units, dtype=torch.long)
    everyone = torch.arange(units)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(count - 1):
        # the next hull vertex is the level with the best gain per byte from here; of equals the farthest
        gain = loss[everyone, at][:, None] - loss
        added = cost - cost[everyone, at][:, None]
        ahead = torch.arange(count) > at[:, None]
        rate = torch.where(ahead & (gain > 0), gain / added.clamp_min(1e-9), -1.0)
        best, _ = rate.max(1)
        level = count - 1 - (rate.flip(1) == best[:, None]).long().argmax(1)
        moving = best > 0
        if not bool(moving.any()):
            break
        who = everyone[moving]
        parts.append((who, level[moving], added[who, level[moving]], gain[who, level[moving]]))
        at = torch.where(moving, level, at)
    if not parts:
        empty = torch.empty(0, dtype=torch.long)
        return Steps(empty, empty, empty.double(), empty.double())
    unit, level, added, gain = (torch.cat(column) for column in zip(*parts, strict=True))
    # along a unit's hull the rate falls, so a stable sort keeps its steps in order
    order = torch.sort(gain / added, descending=True, stable=True).indices
    return Steps(unit[order], level[order], added[order], gain[order])


def take(problem: Choices, steps: Steps, count: int) -> Tensor:
    """The choice after the first `count` steps: int64 [U]."""
    choice = torch.zeros(len(problem.loss_UL), dtype=torch.long)
    return choice.scatter_reduce(0, steps.unit[:count], steps.level[:count], "amax")


def _spend(problem: Choices, choice: Tensor, room: float) -> Tensor:
    """Use what is left of a byte budget: single upgrades that fit, the best gain per byte first."""
    loss, cost = problem.loss_UL, problem.cost_UL
    everyone = torch.arange(len(loss))
    while True:
        gain = loss[everyone, choice][:, None] - loss
        added = cost - cost[everyone, choice][:, None]
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
    # of a handful of units, all at one level may use the room better than the hull and what is left over
    uniform = [torch.full_like(spent, i) for i, cost in enumerate(problem.cost_UL.sum(0).tolist()) if cost <= room]
    return min([spent, *uniform], key=lambda c: float(problem.loss_UL.gather(1, c[:, None]).sum()))


def _predicted_gain(predicted_UL: Tensor, steps: Steps) -> Tensor:
    """What each step takes away of what is predicted, float64 [S]."""
    order = torch.sort(steps.unit, stable=True).indices
    unit, level = steps.unit[order], steps.level[order]
    before = torch.cat([level.new_zeros(1), level[:-1]])[: len(level)]
    first = torch.cat([unit.new_full((1,), -1), unit[:-1]])[: len(unit)] != unit
    before = torch.where(first, 0, before)
    gain = torch.empty(len(order), dtype=torch.float64)
    gain[order] = predicted_UL[unit, before] - predicted_UL[unit, level]
    return gain


def solve_loss(problem: Choices, limit: float, inputs: float = 0.0) -> Tensor:
    """The fewest bytes whose loss, with what inputs lose, is at most `limit`."""
    steps = ordered_steps(problem)
    predicted = problem.predicted_UL
    start = float(predicted[:, 0].sum())
    least = float(predicted.min(1).values.sum())
    limit *= 1 + 1e-9  # a map's own loss, given back as a limit, must not fail by the last place of a float
    limit -= inputs
    if least > limit:
        total = limit + inputs
        raise BudgetError(f"no map loses as little as {total:g}: the least predicted loss is {least + inputs:g}")
    if start <= limit:
        return take(problem, steps, 0)
    end = take(problem, steps, len(steps.unit))
    reached = float(predicted.gather(1, end[:, None]).sum())
    if reached > limit:  # no step leads to levels that lose as much as lower ones, but less may be predicted of them
        choice, taken = predicted.argmin(1), least
    else:
        gain = _predicted_gain(predicted, steps)
        left = reached + gain.flip(0).cumsum(0).flip(0) - gain  # added up from the end, where it is least
        count = int((left > limit).nonzero().max()) + 2 if bool((left > limit).any()) else 1
        choice, taken = take(problem, steps, count), float(left[count - 1])
    # the last step may have overshot: give back what is not needed, the most bytes first
    slack = limit - taken
    loss, cost = predicted, problem.cost_UL
    everyone = torch.arange(len(loss))
    below = (choice - 1).clamp_min(0)
    rise = loss[everyone, below] - loss[everyone, choice]
    saved = cost[everyone, choice] - cost[everyone, below]
    for unit in torch.sort(saved / rise.clamp_min(1e-30), descending=True, stable=True).indices[:4096].tolist():
        if saved[unit] > 0 and float(rise[unit]) <= slack:
            choice[unit] = below[unit]
            slack -= float(rise[unit])
    return choice
