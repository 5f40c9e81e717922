"""Whether importance is worth a move: hysteresis, a price on change and a cap on moves. Pure functions.

The chain in force was made for the ratios of importance of some earlier moment. At rest estimates fluctuate, and the
best chain with them; every tile that moves costs bytes. So a new chain is proposed only if, by the losses of now, it
loses less than the one in force by a margin (hysteresis) and by a price for each byte that moves. Where at most so many
tiles may move at a time, only the tiles whose change of importance weighs most take their new ratio; the others keep
the ratio for which the chain in force was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import BudgetError
from foveate.formats.levels import TILE_LEVELS
from foveate.importance.rolling import rescaled
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.precision.sites import tile_levels

Ratios = Mapping[str, Tensor]
_SEARCHES = 8


@dataclass(frozen=True, kw_only=True)
class Caution:
    """What a move must be worth, and how much may move at a time.

    Attributes:
        margin: the share of the predicted loss that a move must save, 0 to 1.
        price: nats (or the unit of the objective) that each MiB of moved planes costs.
        most_tiles: the most tiles that move at a time; any number if None.

    Raises:
        BudgetError: a value is out of its range.
    """

    margin: float = 0.02
    price: float = 0.0
    most_tiles: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise BudgetError(f"margin (={self.margin!r}) is not from 0 to below 1")
        if not 0 <= self.price < math.inf:
            raise BudgetError(f"price (={self.price!r}) is not a finite number from 0 on")
        if self.most_tiles is not None and (type(self.most_tiles) is not int or self.most_tiles < 1):
            raise BudgetError(f"most_tiles (={self.most_tiles!r}) is not a positive whole number")


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """A chain, and the ratios of importance that it was made for."""

    chain: Frontier
    ratios: Ratios


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The difference between two maps.

    Attributes:
        tiles: tiles whose level differs.
        bytes: bytes of planes and scales of these tiles that one of the maps reads and the other does not.
    """

    tiles: int
    bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A chain that is worth a move.

    Attributes:
        held: the chain and its ratios.
        moved: how its map differs from the one in force.
        before, after: the losses of the two maps that are predicted for now.
    """

    held: Held
    moved: Moved
    before: float
    after: float


def moved(before: PrecisionMap, after: PrecisionMap) -> Moved:
    """The difference between two maps of one model.

    >>> moved(profile.uniform(4), profile.uniform(3)).tiles
    """
    tiles = size = 0
    for site in before.weight_sites():
        old, new = before.levels[site.name], after.levels[site.name]
        if old == new:
            continue
        table = torch.zeros(TILE_LEVELS[-1] + 1, dtype=torch.long)
        table[list(TILE_LEVELS)] = torch.tensor(site.tile_costs())
        first, second = (
            table[torch.frombuffer(bytearray(tile_levels(levels, site.tiles)), dtype=torch.uint8).long()]
            for levels in (old, new)
        )
        tiles += int((first != second).sum())
        size += int((first - second).abs().sum())
    return Moved(tiles=tiles, bytes=size)


def propose(
    profile: Profile, held: Held, now: Ratios, make: Callable[[Ratios], Frontier], index: int, caution: Caution
) -> Proposal | None:
    """The chain for the importance of now, if it is worth the move; None if the one in force stays.

    Args:
        profile: what calibration measured.
        held: the chain in force.
        now: the ratios of importance of now, float64 [T] for each weight.
        make: makes a chain of ratios.
        index: where on the chain the model is read; a move is judged there.
        caution: margin, price and cap.
    """
    present = held.chain[min(index, len(held.chain) - 1)]

    def tried(ratios: Ratios) -> Proposal:
        return proposal_of(profile, present, Held(chain=make(ratios), ratios=dict(ratios)), now, index)

    def is_worth(one: Proposal) -> bool:
        least = caution.margin * one.before + caution.price * one.moved.bytes / 2**20
        return one.moved.tiles > 0 and one.before - one.after > least

    found = tried(now)
    if not is_worth(found):
        return None
    if caution.most_tiles is None or found.moved.tiles <= caution.most_tiles:
        return found
    weight = {name: (now[name] - held.ratios[name]).abs() * profile.losses[name][:, 0].double() for name in now}
    order = torch.cat([weight[name] for name in now]).argsort(descending=True)
    fewest, most, best = 0, len(order), None
    for _ in range(_SEARCHES):
        count = (fewest + most) // 2
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:count]] = True
        parts = chosen.split([len(weight[name]) for name in now])
        some = {name: torch.where(mine, now[name], held.ratios[name]) for name, mine in zip(now, parts, strict=True)}
        one = tried(some)
        if one.moved.tiles <= caution.most_tiles:
            fewest, best = count, one
        else:
            most = count
    return best if best is not None and is_worth(best) else None


def proposal_of(profile: Profile, present: PrecisionMap, held: Held, losses_of: Ratios, index: int) -> Proposal:
    """The move from the map in force to a chain, whatever it is worth.

    Args:
        profile: what calibration measured.
        present: the map in force.
        held: the chain to move to, and its ratios.
        losses_of: the ratios by which losses are predicted.
        index: where on the chain the model would be read.
    """
    losses_now = rescaled(profile, losses_of)
    plan = held.chain[min(index, len(held.chain) - 1)]
    return Proposal(
        held=held,
        moved=moved(present, plan),
        before=weight_loss(losses_now, present),
        after=weight_loss(losses_now, plan),
    )


def chosen(divergences: Mapping[str, float], margin: float) -> str:
    """Which of the measured candidates is read from now on.

    >>> chosen({"held": 0.020, "static": 0.021, "online": 0.015}, 0.02)
    'online'

    Args:
        divergences: of `held`, the map in force; of `static`, the one without importance; and of `online`, the one
            that is proposed, if there is one.
        margin: the share by which another candidate must be better than the map in force; the proposal, whose worth
            was predicted, need only not be worse.
    """
    held = divergences["held"]
    found, best = "held", held
    if divergences.get("online", math.inf) <= held and math.isfinite(divergences.get("online", math.inf)):
        found, best = "online", divergences["online"]
    if divergences.get("static", math.inf) < (1 - margin) * best:
        found = "static"
    return found


def weight_loss(profile: Profile, plan: PrecisionMap) -> float:
    """The loss that a profile predicts for a map's weights, in the objective's unit."""
    return profile.predict(plan) - profile.predict_inputs(plan.levels)
