"""From importance to a frontier: levels for every budget of the frontier in force. Pure functions.

What rolling importance hands over must be a frontier, on which the runtime manager and requests keep their points. So
each map of the frontier in force is a budget, the bytes of its tiles, and gets a map of at most as many bytes. There
are two ways to choose levels:

- *Lagrangian* (the default): the steps of all units by the loss that they remove for each byte. The maps are prefixes
  of one sequence of steps, and so are nested.
- *Thresholds* (patent 10846621): a unit whose importance is above the first threshold gets the first level, and so on;
  below the last it gets the last level, such as 0. All thresholds are multiplied by one number, the least for which the
  map is within the budget. Maps of smaller budgets have higher thresholds, and so are nested.

Shapes: U units, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from foveate.allocate.constraints import Constraints
from foveate.allocate.problem import Problem, build
from foveate.allocate.solve import ordered_steps, solve_bytes, take
from foveate.errors import BudgetError, LevelError
from foveate.formats.levels import check_weight_level
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile

_HALVINGS = 80


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Levels by thresholds of importance.

        Thresholds(levels=(8, 4, 2, 0), at=(1.0, 0.05, 0.002))

    Attributes:
        levels: the levels, the highest first; weights on planes have 8, 6, 4, 3, 2 and 0.
        at: the thresholds between them, the highest first, one fewer than levels. Under a budget only their ratios
            count; without one they are multiples of the model's mean importance. The defaults are a factor of 4 for
            each bit, by which the loss of a tile falls.

    Raises:
        LevelError: weights cannot have one of the levels, or levels do not fall.
        BudgetError: thresholds do not fall, are not positive, or are not one fewer than levels.
    """

    levels: Sequence[int] = (8, 6, 4, 3, 2, 0)
    at: Sequence[float] = (4.0**4, 4.0**2, 4.0, 1.0, 0.25)

    def __post_init__(self) -> None:
        levels, at = tuple(map(check_weight_level, self.levels)), tuple(map(float, self.at))
        if len(levels) < 2 or any(a <= b for a, b in pairwise(levels)):
            raise LevelError(f"levels (={levels}) of thresholds are not at least two that fall")
        if len(at) != len(levels) - 1:
            raise BudgetError(f"{len(at)} thresholds for {len(levels)} levels: there is one between each two")
        if any(a <= b for a, b in pairwise(at)) or not 0 < at[-1] < at[0] * 2 < float("inf"):
            raise BudgetError(f"thresholds (={at}) are not positive finite numbers that fall")
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "at", at)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rooms:
    """The budgets of a chain.

    Attributes:
        tile_bytes: for each map the bytes of planes and scales that it may take, the most first.
        input_levels: for each map the level of each input, nested.
    """

    tile_bytes: tuple[int, ...]
    input_levels: tuple[Mapping[str, int], ...]


def rooms_of(chain: Sequence[PrecisionMap]) -> Rooms:
    """The budgets that are the bytes of given maps, such as those of a frontier. Maps that take more than the one
    before are given as much as that one.
    """
    rooms: list[int] = []
    inputs: list[Mapping[str, int]] = []
    for plan in chain:
        taken = sum(plan.tile_bytes(site) for site in plan.weight_sites())
        levels = {s.name: cast(int, plan.levels[s.name]) for s in plan.sites if s.kind == "input"}
        if rooms:
            taken = min(taken, rooms[-1])
            levels = {name: min(level, inputs[-1][name]) for name, level in levels.items()}
        rooms.append(taken)
        inputs.append(levels)
    return Rooms(tile_bytes=tuple(rooms), input_levels=tuple(inputs))


def chain_of(
    profile: Profile, rooms: Rooms, constraints: Constraints, stored: Mapping[str, Tensor] | None = None
) -> Frontier:
    """The frontier of least predicted loss within the budgets; its maps are nested.

    Args:
        profile: the losses, rescaled by importance (`foveate.importance.rolling.rescaled`).
        rooms: the budgets.
        constraints: the levels to choose among, ties, and whether levels differ within a weight.
        stored: the highest level that each tile can be read at, uint8 [T]; any level if not given.

    Raises:
        BudgetError: the smallest budget is less than the lowest levels take.
    """
    problem = _within_stored(_problem(profile, rooms, constraints), stored)
    note = f"no map of these levels takes as little as {rooms.tile_bytes[-1]} bytes of planes"
    if len(rooms.tile_bytes) == 1:
        choices = [solve_bytes(problem, rooms.tile_bytes[0], note)]
    else:
        steps = ordered_steps(problem)
        spent = steps.cost.cumsum(0) + float(problem.cost_UL[:, 0].sum())
        if float(problem.cost_UL[:, 0].sum()) > rooms.tile_bytes[-1]:
            raise BudgetError(note)
        choices = [take(problem, steps, int((spent <= room + 0.5).sum())) for room in rooms.tile_bytes]
    return _frontier(problem, choices, rooms)


def thresholds_chain_of(
    profile: Profile,
    rooms: Rooms | None,
    constraints: Constraints,
    thresholds: Thresholds,
    importance: Mapping[str, Tensor],
    stored: Mapping[str, Tensor] | None = None,
) -> Frontier:
    """The frontier that thresholds choose within the budgets; its maps are nested.

    Args:
        profile: sites; its losses are not used.
        rooms: the budgets; if None, one map, whose thresholds are multiples of the mean importance.
        constraints: ties, and whether levels differ within a weight; its levels are not used.
        thresholds: the levels and thresholds.
        importance: of a weight, or of a byte, of each tile, float64 [T]. A unit of several tiles has their mean.
        stored: as for `chain_of`.

    Raises:
        BudgetError: the smallest budget is less than the last level takes.
    """
    constraints = replace(constraints, levels=thresholds.levels)
    problem = _within_stored(_problem(profile, rooms, constraints), stored)
    units = torch.cat([problem.unit_of[s.name] for s in profile.weight_sites()])
    worth = torch.cat([importance[s.name] for s in profile.weight_sites()])
    size = torch.cat([torch.full((s.tiles,), s.bytes_of_planes()).double() for s in profile.weight_sites()])
    zeros_U = torch.zeros(len(problem.loss_UL), dtype=torch.float64)
    worth_U = zeros_U.index_add(0, units, worth * size) / zeros_U.index_add(0, units, size)
    cuts = torch.tensor(thresholds.at[::-1], dtype=torch.float64)

    def choice(factor: float) -> Tensor:
        return torch.bucketize(worth_U, cuts * factor)

    if rooms is None:
        return _frontier(problem, [choice(float((worth * size).sum() / size.sum()))], None)
    choices = [_least_factor(problem, room, choice, worth_U / cuts[-1]) for room in rooms.tile_bytes]
    return _frontier(problem, choices, rooms)


def _least_factor(problem: Problem, room: int, choice: Callable[[float], Tensor], scores_U: Tensor) -> Tensor:
    """The choice at the least factor of the thresholds for which it is within so many bytes."""

    def taken(choice_U: Tensor) -> float:
        return float(problem.cost_UL.gather(1, choice_U[:, None]).sum())

    if taken(torch.zeros(len(problem.loss_UL), dtype=torch.long)) > room:
        raise BudgetError(f"no map of these levels takes as little as {room} bytes of planes")
    # at the high end every unit has the last level, at the low end as many as the budget allows
    high = max(float(scores_U.max()), 1e-300) * 1e12
    low = high * 1e-40
    if taken(choice(low)) <= room:
        return choice(low)
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if taken(choice(middle)) <= room else (middle, high)
    return choice(high)


def _problem(profile: Profile, rooms: Rooms | None, constraints: Constraints) -> Problem:
    return build(profile, constraints, rooms.input_levels[0] if rooms is not None else None)


def _within_stored(problem: Problem, stored: Mapping[str, Tensor] | None) -> Problem:
    """The problem in which levels above a unit's stored one gain and cost nothing more."""
    if stored is None:
        return problem
    most_U = torch.full((len(problem.loss_UL),), max(problem.levels), dtype=torch.long)
    for name, units in problem.unit_of.items():
        most_U.scatter_reduce_(0, units, stored[name].long().view(-1), "amin")
    last_U = torch.bucketize(most_U, torch.tensor(problem.levels), right=True) - 1
    if bool((last_U < 0).any()):
        raise BudgetError(f"tiles are stored at less than {problem.levels[0]} bits, the lowest level to choose")
    column = torch.minimum(torch.arange(len(problem.levels))[None], last_U[:, None])
    return replace(problem, loss_UL=problem.loss_UL.gather(1, column), cost_UL=problem.cost_UL.gather(1, column))


def _frontier(problem: Problem, choices: Sequence[Tensor], rooms: Rooms | None) -> Frontier:
    """The maps of choices; levels that gain nothing over a lower one are the lower one."""
    maps: list[PrecisionMap] = []
    for number, choice_U in enumerate(choices):
        # where planes are not stored, higher levels cost what the stored one costs: the first of equals is meant
        cost_U = problem.cost_UL.gather(1, choice_U[:, None])
        lowest_U = (problem.cost_UL == cost_U).long().argmax(1)
        inputs = problem.input_levels if rooms is None else rooms.input_levels[number]
        maps.append(replace(problem, input_levels=inputs).to_map(lowest_U))
    return Frontier(tuple(maps))
