"""LevelState: everything that has been decided about the levels of a live model, and by whom; `compose` makes it maps.

Deciders never write levels. Each gives its part of the state under a name of its own, and can withdraw it:

- a *frontier*, the chain of maps in force: the user, a stored frontier, or rolling importance. The one that was handed
  over last is in force; when its decider withdraws, the one before it is;
- an *index* on that frontier: the runtime manager. Where several demand one, the furthest counts;
- a *floor*, the furthest index that is acceptable, as an index or as average bits. No index goes beyond any floor;
- *requests* of single rows: a fixed index, or a floor of their own. Rows of one request are a class;
- *raises* of inputs above the level of their map, in steps along 4, 8 and 16 bits: the watch for drift. While any input
  is raised, static ranges are suspended, since they come from the same calibration data;
- static *ranges* of inputs;
- an *adaptation*: each input chooses, weight by weight, between two maps around the index. That which was handed over
  last is in force.

`compose` is pure. What it makes is what a generation of the model holds: a table of maps, and for each class of rows
which of them its rows read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar, cast

from foveate.errors import BudgetError, FloorError
from foveate.kernels.planes.generations import MAX_MAPS
from foveate.precision.adaptation import Adaptation, Choice
from foveate.precision.encoding import EncodedLevels
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Levels

T = TypeVar("T")
_RAISED = (4, 8, 16)
#: How far below a floor a map's bits may be: the bits of an existing map, printed and read again, must be met.
_ROUNDING = 0.005


@dataclass(frozen=True, kw_only=True)
class Floor:
    """How far along a frontier precision may go. Give exactly one of the attributes.

    Attributes:
        index: the furthest index.
        bits: the least average bits of the weights, scales included (`PrecisionMap.bits`).
    """

    index: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (self.bits is None):
            raise BudgetError(f"a floor is exactly one of index (={self.index}) and bits (={self.bits})")
        if self.index is not None and (type(self.index) is not int or self.index < 0):
            raise BudgetError(f"floor index (={self.index!r}) is not a whole number from 0 on")
        if self.bits is not None and not 0 < self.bits < float("inf"):
            raise BudgetError(f"floor bits (={self.bits!r}) is not a positive finite number")

    def on(self, frontier: Frontier) -> int:
        """The furthest index of a frontier that this floor allows; raises `FloorError` if not even the best does."""
        if self.bits is None:
            assert self.index is not None
            return min(self.index, len(frontier) - 1)
        if frontier.bits(0) < self.bits - _ROUNDING:
            raise FloorError(
                f"a floor of {self.bits:g} bits cannot be met: the best map of the frontier has {frontier.bits(0):.3f}"
            )
        below = (i for i in range(1, len(frontier)) if frontier.bits(i) < self.bits - _ROUNDING)
        return next(below, len(frontier)) - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the rows of one class ask for. Without any attribute they follow the index in force.

    Attributes:
        tier: the index at which they are read, whatever the index in force. A tier beyond the end is the end.
        floor: the furthest that they accept.
    """

    tier: int | None = None
    floor: Floor | None = None

    def __post_init__(self) -> None:
        if self.tier is not None and (type(self.tier) is not int or self.tier < 0):
            raise BudgetError(f"tier (={self.tier!r}) is not a whole number from 0 on")
        if self.tier is not None and self.floor is not None:
            raise BudgetError("a request has a tier or a floor, not both: a tier is fixed")


@dataclass(frozen=True, kw_only=True)
class LevelState:
    """What each decider gave, by its name. Frozen; the methods give changed copies.

    Attributes:
        frontiers: the chains that were handed over, the one in force last.
        indices: the index that each demands; without any it is 0.
        floors: the floors that stand.
        requests: the classes of rows beside the default one, in the order of their numbers, from 1 on.
        raises: for inputs, by how many steps of 4, 8 and 16 bits they are raised.
        ranges: the static range of inputs that have one, unless they are suspended.
        adaptations: how inputs choose between two maps, the one in force last.
    """

    frontiers: Mapping[str, Frontier]
    indices: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, Floor] = field(default_factory=dict)
    requests: Mapping[str, Request] = field(default_factory=dict)
    raises: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    adaptations: Mapping[str, Adaptation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.frontiers:
            raise BudgetError("a state has at least one frontier")
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> Any:  # a view of a dictionary can neither be copied nor pickled
        parts = {name: dict(getattr(self, name)) for name in self.__dataclass_fields__}
        return _state, (parts,)

    @property
    def frontier(self) -> Frontier:
        """The frontier in force."""
        return self.frontiers[self.frontier_by]

    @property
    def frontier_by(self) -> str:
        """Who handed over the frontier in force."""
        return next(reversed(list(self.frontiers)))

    @property
    def classes(self) -> Mapping[str, int]:
        """The number of the class of each request; 0 is the default class."""
        return {name: number for number, name in enumerate(self.requests, 1)}

    @property
    def floor(self) -> int:
        """The furthest index that all floors allow."""
        return min([len(self.frontier) - 1, *(floor.on(self.frontier) for floor in self.floors.values())])

    @property
    def index(self) -> int:
        """The index in force: the furthest that is demanded, and no further than the floor."""
        return min(max(self.indices.values(), default=0), self.floor)

    def index_of(self, request: Request | None) -> int:
        """The index at which the rows of a request are read; those without one follow the index in force.

        Raises:
            FloorError: the frontier in force cannot meet the floor of the request.
        """
        if request is not None and request.tier is not None:
            return min(request.tier, self.floor)
        own = None if request is None else request.floor
        return self.index if own is None else min(self.index, own.on(self.frontier))

    @property
    def adaptation(self) -> Adaptation | None:
        """How inputs choose; None if they do not."""
        return next(reversed(list(self.adaptations.values())), None)

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """For each class of rows the indices (low, high) of its maps, the default class first."""
        adaptation, found = self.adaptation, []
        for request in (None, *self.requests.values()):
            at = self.index_of(request)
            if adaptation is None or (request is not None and request.tier is not None):  # a tier is fixed
                found.append((at, at))
                continue
            own = None if request is None else request.floor
            limit = self.floor if own is None else min(self.floor, own.on(self.frontier))
            found.append(adaptation.around(at, limit))
        return tuple(found)

    def with_frontier(self, decider: str, frontier: Frontier) -> LevelState:
        """A frontier is handed over, and is in force from then on."""
        others = {name: one for name, one in self.frontiers.items() if name != decider}
        return replace(self, frontiers={**others, decider: frontier})

    def with_index(self, decider: str, index: int) -> LevelState:
        """An index is demanded; raises `BudgetError` if it is not on the frontier in force."""
        if type(index) is not int or not 0 <= index < len(self.frontier):
            raise BudgetError(f"index (={index!r}) is not on the frontier, 0..{len(self.frontier) - 1}")
        return replace(self, indices=_with(self.indices, decider, index))

    def with_floor(self, decider: str, floor: Floor) -> LevelState:
        """A floor stands; raises `FloorError` if the frontier in force cannot meet it."""
        floor.on(self.frontier)
        return replace(self, floors=_with(self.floors, decider, floor))

    def with_request(self, decider: str, request: Request) -> LevelState:
        """A class of rows is added, or changed."""
        return replace(self, requests=_with(self.requests, decider, request))

    def with_raises(self, decider: str, raises: Mapping[str, int]) -> LevelState:
        """Inputs are raised; none, if the mapping is empty."""
        return replace(self, raises=_with(self.raises, decider, dict(raises)))

    def with_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> LevelState:
        """Inputs have static ranges."""
        return replace(self, ranges=dict(ranges))

    def with_adaptation(self, decider: str, adaptation: Adaptation) -> LevelState:
        """Inputs choose between two maps around the index from then on."""
        others = {name: one for name, one in self.adaptations.items() if name != decider}
        return replace(self, adaptations={**others, decider: adaptation})

    def without(self, decider: str) -> LevelState:
        """A decider withdraws all that it gave, but for the only frontier, since a model always has one."""
        return replace(
            self,
            frontiers=_without(self.frontiers, decider) or self.frontiers,
            indices=_without(self.indices, decider),
            floors=_without(self.floors, decider),
            requests=_without(self.requests, decider),
            raises=_without(self.raises, decider),
            adaptations=_without(self.adaptations, decider),
        )


def _state(parts: Mapping[str, Any]) -> LevelState:
    return LevelState(**parts)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What a generation holds.

    Attributes:
        maps: the maps in use, the best first; at most 8.
        encoded: the levels of each.
        pairs: for each class of rows the numbers of its maps, low and high; class 0 is the default.
        ranges: the static ranges of inputs that are in force.
        choices: for each pair whose two maps differ, what decides between them.
    """

    maps: tuple[PrecisionMap, ...]
    encoded: tuple[EncodedLevels, ...]
    pairs: tuple[tuple[int, int], ...]
    ranges: Mapping[str, tuple[float, float]]
    choices: Mapping[tuple[int, int], Choice] = field(default_factory=dict)

    @property
    def plan(self) -> PrecisionMap:
        """The map of rows for which nothing was asked; where inputs choose, the higher of the two."""
        return self.maps[self.pairs[0][1]]


def compose(state: LevelState) -> Composed:
    """The maps and classes that a state means.

    Raises:
        FloorError: a floor, standing or of a request, cannot be met.
        BudgetError: the requests need more than 8 different maps.
    """
    frontier, adaptation, wanted = state.frontier, state.adaptation, state.ends
    table = sorted({index for ends in wanted for index in ends})
    if len(table) > MAX_MAPS:
        raise BudgetError(f"the requests need {len(table)} different maps at once; at most {MAX_MAPS} can be in use")
    raises: dict[str, int] = {}
    for given in state.raises.values():
        for site, steps in given.items():
            raises[site] = max(steps, raises.get(site, 0))
    suspended = any(raises.values())
    maps = tuple(raised_map(frontier[i], raises) for i in table)
    return Composed(
        maps=maps,
        encoded=tuple(_encoded(frontier, i, plan) for i, plan in zip(table, maps, strict=True)),
        pairs=tuple((table.index(low), table.index(high)) for low, high in wanted),
        ranges=MappingProxyType({}) if suspended else state.ranges,
        choices={
            (table.index(low), table.index(high)): adaptation.choice(frontier, low, high)
            for low, high in dict.fromkeys(wanted)
            if adaptation is not None and low != high
        },
    )


def _encoded(frontier: Frontier, index: int, plan: PrecisionMap) -> EncodedLevels:
    """The levels of a map of the frontier, of which only inputs may have changed since."""
    made = frontier.encoded(index)
    if plan is frontier[index]:
        return made
    return replace(made, inputs=bytes(cast(int, plan.levels[s.name]) for s in plan.sites if s.kind == "input"))


def raised_level(plan: PrecisionMap, name: str, steps: int) -> int:
    """The level of an input, so many steps of 4, 8 and 16 bits above that of a map; 32 stays 32."""
    level = cast(int, plan.levels[name])
    if level not in _RAISED:
        return level
    return _RAISED[min(_RAISED.index(level) + steps, len(_RAISED) - 1)]


def raised_map(plan: PrecisionMap, raises: Mapping[str, int]) -> PrecisionMap:
    """A map with inputs raised by steps; the map itself where that changes nothing."""
    higher: dict[str, Levels] = {name: raised_level(plan, name, steps) for name, steps in raises.items() if steps}
    if all(plan.levels[name] == level for name, level in higher.items()):
        return plan
    return replace(plan, levels={**plan.levels, **higher}, predicted_loss=float("nan"))


def _with(given: Mapping[str, T], name: str, value: T) -> Mapping[str, T]:
    return {**given, name: value}


def _without(given: Mapping[str, T], name: str) -> Mapping[str, T]:
    return {n: value for n, value in given.items() if n != name}
