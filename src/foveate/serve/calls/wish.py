"""Wish and Given: the precision that a request asks for, and the precision that its answer got.

In a body, `precision` is an object with a tier or a floor:

    {"tier": "auto"}   follow the index in force, which the manager moves (the default)
    {"tier": 2}        index 2 of the frontier for all of this answer; {"tier": "4.25"} the point of that name
    {"floor": 3}       follow the index in force, but no further than index 3; {"floor": "4.25"} at least 4.25 bits

So a whole number is an index of the frontier, of which 0 is the best, and a text is a name or average bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.errors import BudgetError, FloorError
from foveate.precision.frontiers import Frontier
from foveate.precision.state import Floor, Request
from foveate.serve.calls.refused import RefusedRequest


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The precision that a request asks for, before it is known what the frontier has.

    Attributes:
        tier: a fixed index or the name of a point; None follows the index in force.
        floor: the furthest index, or the least average bits as a text; None accepts all.
    """

    tier: int | str | None = None
    floor: int | str | None = None

    @staticmethod
    def parse(value: Any) -> Wish:
        """The wish in a body's field `precision`; raises `RefusedRequest`."""
        if value is None:
            return Wish()
        if not isinstance(value, dict) or not set(value) <= {"tier", "floor"}:
            raise RefusedRequest("precision is not an object with tier or floor", parameter="precision")
        for name, one in value.items():
            is_index = type(one) is int and 0 <= one < 256
            if one is not None and not is_index and not (isinstance(one, str) and 0 < len(one) <= 80):
                raise RefusedRequest(
                    f"precision.{name} (={one!r}) is neither an index of the frontier, a whole number, nor a text "
                    'such as "4.25"',
                    parameter=f"precision.{name}",
                )
        tier, floor = value.get("tier"), value.get("floor")
        if tier not in (None, "auto") and floor is not None:
            raise RefusedRequest("precision has a tier or a floor, not both: a tier is fixed", parameter="precision")
        return Wish(tier=None if tier == "auto" else tier, floor=floor)

    def on(self, frontier: Frontier, names: Mapping[str, int] | None = None) -> Request | None:
        """What the rows of the request ask for; None if they follow the index in force.

        Args:
            frontier: the chain in force.
            names: the indices that names stand for; those of the frontier's points if not given.

        Raises:
            RefusedRequest: the frontier has no such point, or cannot meet the floor.
        """
        try:
            if self.tier is not None:
                return Request(tier=_index_of(self.tier, frontier, names))
            if self.floor is None:
                return None
            floor = floor_of(self.floor, frontier, names)
            floor.on(frontier)
            return Request(floor=floor)
        except (BudgetError, FloorError) as error:
            name = "floor" if self.tier is None else "tier"
            raise RefusedRequest(f"precision.{name}: {error}", parameter=f"precision.{name}") from error


def floor_of(value: int | str, frontier: Frontier, names: Mapping[str, int] | None = None) -> Floor:
    """The floor that an index, the name of a point or average bits mean; raises `BudgetError`."""
    if isinstance(value, int) or value in (_names(frontier) if names is None else names):
        return Floor(index=_index_of(value, frontier, names))
    try:
        bits = float(value)
    except ValueError:
        raise BudgetError(f"floor (={value!r}) is neither the name of a point nor average bits") from None
    return Floor(bits=bits)


def _names(frontier: Frontier) -> dict[str, int]:
    return {point.name: point.index for point in frontier.points}


def _index_of(value: int | str, frontier: Frontier, names: Mapping[str, int] | None) -> int:
    if isinstance(value, str):
        known = _names(frontier) if names is None else names
        return known[value] if value in known else frontier.find(value)
    if value >= len(frontier):
        raise BudgetError(f"index (={value}) is not on the frontier, which has the indices 0 to {len(frontier) - 1}")
    return value


@dataclass(kw_only=True)
class Given:
    """The precision that one answer got, written down pass by pass.

    Attributes:
        best, worst: the least and the furthest index of its passes; None before the first.
        tokens: tokens of the answer so far, and `passes`, prompt included.
        token_bits, pass_bits: the sum over them of the average bits of a weight.
        min_bits: the least bits of a pass.
        switches: how often the index differed from that of the pass before.
        last: the index of the last pass; None before the first.
    """

    best: int | None = None
    worst: int | None = None
    tokens: int = 0
    passes: int = 0
    token_bits: float = 0.0
    pass_bits: float = 0.0
    min_bits: float = math.inf
    switches: int = 0
    last: int | None = None

    def add(self, index: int, bits: float, token: bool) -> None:
        """Write down one pass: its index, the average bits that it read, and whether it gave a token of the answer."""
        self.best = index if self.best is None else min(self.best, index)
        self.worst = index if self.worst is None else max(self.worst, index)
        self.passes += 1
        self.pass_bits += bits
        self.min_bits = min(self.min_bits, bits)
        self.tokens += token
        self.token_bits += bits * token
        self.switches += self.last is not None and self.last != index
        self.last = index

    def report(self, wish: Wish) -> dict[str, Any]:
        """What the answer says of it.

        Args:
            wish: what was asked for.

        Returns:
            `tier` ("auto" or the index that was fixed), `best` and `worst` (the indices of its passes), `bits` (the
            mean over the tokens of the answer), `min_bits`, and `switches`. Before the first pass the numbers are None.
        """
        bits = self.token_bits / self.tokens if self.tokens else self.pass_bits / max(self.passes, 1)
        return {
            "tier": "auto" if wish.tier is None else self.last,
            "best": self.best,
            "worst": self.worst,
            "bits": round(bits, 4) if self.passes else None,
            "min_bits": round(self.min_bits, 4) if self.passes else None,
            "switches": self.switches,
        }
