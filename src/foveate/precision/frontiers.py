"""Frontier: a nested chain of precision maps, each one step cheaper than the one before, and what was measured of it.

A process that changes precision while it runs moves one number, the index of a map on the frontier. The maps are
nested: no tile and no input has a higher level in a map than in the map before. So moving along the chain only leaves
planes out or takes them back. Some of the maps are measured (`Point`), and the others lie between them.

    chain = fv.measure_frontier(model, fv.frontier(profile, 64), held_out)
    fv.apply(model, chain[chain.find("4.25")])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

from foveate.errors import BudgetError, LevelError
from foveate.precision.budgets import Budget
from foveate.precision.encoding import EncodedLevels, encoded_levels, first_rise
from foveate.precision.maps import PrecisionMap
from foveate.precision.monotone import between, ordered
from foveate.sizes import format_bytes, format_seconds, parse_bytes, parse_seconds

#: The most maps of a frontier: a place in it is stored as one byte (docs/format.md).
MOST_MAPS = 255
#: How far a map's bits may exceed a limit: the bits of an existing map, printed and read again, must be found.
_ROUNDING = 0.005


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured of one map of a frontier.

        Point(index=0, name="8", bits=8.25, bytes_read=2**20, divergence=0.01, standard_error=0.001)

    Attributes:
        index: which map of the frontier.
        name: what the point is called, unique in its frontier: `"8"` where all weights are at level 8, or `"4.25"`.
        bits: average bits of a weight, scales included (`PrecisionMap.bits`).
        bytes_read: bytes that a token reads (`PrecisionMap.bytes_read`).
        divergence: the mean divergence from the reference on held-out data, in the unit of the frontier.
        standard_error: the standard error of `divergence`; NaN if unknown.
        seconds: the time of one token of a language model, or of one sample, with nothing beside it; None if not timed.
        batch_seconds: the time of a whole batch of held-out data, a prefill for a language model; None if not timed.

    Raises:
        LevelError: a value is not of its kind, such as a negative index or a divergence that is not finite.
    """

    index: int
    name: str
    bits: float
    bytes_read: int
    divergence: float
    standard_error: float = math.nan
    seconds: float | None = None
    batch_seconds: float | None = None

    def __post_init__(self) -> None:
        if type(self.index) is not int or not 0 <= self.index < MOST_MAPS:
            raise LevelError(f"index (={self.index!r}) of a point is not one of 0 to {MOST_MAPS - 1}")
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable() or len(self.name) > 80:
            raise LevelError(f"name (={self.name!r}) of a point is not a printable text of 1 to 80 characters")
        if type(self.bytes_read) is not int or self.bytes_read < 0:
            raise LevelError(f"bytes_read (={self.bytes_read!r}) of point {self.name} is not a number of bytes")
        for name in ("bits", "divergence"):
            if not _is_amount(getattr(self, name)):
                raise LevelError(f"{name} (={getattr(self, name)!r}) of point {self.name} is not finite and at least 0")
        error = self.standard_error
        if not isinstance(error, float) or not (math.isnan(error) or _is_amount(error)):
            raise LevelError(f"standard_error (={error!r}) of point {self.name} is not NaN or finite and at least 0")
        for name in ("seconds", "batch_seconds"):
            value = getattr(self, name)
            if value is not None and not (_is_amount(value) and value > 0):
                raise LevelError(f"{name} (={value!r}) of point {self.name} is not a positive time")


@dataclass(frozen=True)
class Frontier:
    """A nested chain of precision maps, each one step cheaper than the one before; index 0 is the best.

        chain = fv.frontier(profile, 64)
        chain[0].bits, len(chain), chain.bytes_read(10)

    Attributes:
        maps: the maps, at most 255, all of the same sites. No tile and no input has a higher level than in the map
            before.
        points: what was measured of some of the maps, by ascending index. If there are any, the first map and the last
            are among them.
        unit: the unit of the divergences, `nats` for a language model; empty if nothing was measured.
        machine: the machine and the number of threads that the times are of; empty if nothing was timed.

    Raises:
        LevelError: the maps are not nested, or a point is not of its map.
    """

    maps: tuple[PrecisionMap, ...]
    points: tuple[Point, ...] = field(default=(), kw_only=True)
    unit: str = field(default="", kw_only=True)
    machine: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple(self.maps))
        object.__setattr__(self, "points", tuple(self.points))
        if not 1 <= len(self.maps) <= MOST_MAPS:
            raise LevelError(f"a frontier has 1 to {MOST_MAPS} maps, not {len(self.maps)}")
        if not isinstance(self.unit, str) or not isinstance(self.machine, str):
            raise LevelError(f"unit (={self.unit!r}) and machine (={self.machine!r}) are not texts")
        for index, (better, cheaper) in enumerate(pairwise(self.maps), 1):
            name = first_rise(better, cheaper)
            if name:
                raise LevelError(f"the maps are not nested: {name} has a higher level at index {index} than before")
        if self.points:
            self._check_points()

    def _check_points(self) -> None:
        indices = [point.index for point in self.points]
        if indices != sorted(set(indices)) or indices[0] != 0 or indices[-1] != len(self.maps) - 1:
            raise LevelError(
                f"points are at the indices {', '.join(map(str, indices))}: they rise from 0 to {len(self.maps) - 1}, "
                "the last map"
            )
        if len({point.name for point in self.points}) != len(indices):
            raise LevelError(f"two points have one name: {', '.join(point.name for point in self.points)}")
        for point in self.points:
            plan = self.maps[point.index]
            if point.bytes_read != plan.bytes_read or not math.isclose(point.bits, plan.bits, rel_tol=1e-6):
                raise LevelError(f"point {point.name} is not of the map at index {point.index}: bits or bytes differ")

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> PrecisionMap:
        return self.maps[index]

    def __iter__(self) -> Iterator[PrecisionMap]:
        return iter(self.maps)

    def __repr__(self) -> str:
        ends = f"{self.maps[0].bits:.2f} to {self.maps[-1].bits:.2f} bits a weight on planes"
        measured = f"{len(self.points)} of them measured" if self.points else "not measured"
        return f"Frontier({len(self.maps)} maps, {ends}, {measured})"

    def kl(self, index: float) -> float:
        """The divergence at an index, in `unit`: measured at points, and in between on the curve of predicted losses.

        The curve never falls along the chain. A fraction lies between two maps: 2.25 is three quarters of the map at
        index 2 and one quarter of that at index 3, as where rows choose between the two.

        Raises:
            BudgetError: nothing was measured, or the index is not on the frontier.
        """
        return self._along(index, self._divergences)

    def bytes_read(self, index: float) -> float:
        """Bytes that a token reads at an index; exact for a whole number.

        Raises:
            BudgetError: the index is not on the frontier.
        """
        return self._along(index, self._bytes_read)

    def bits(self, index: float) -> float:
        """Average bits of a weight at an index, scales included; exact for a whole number. Errors as `bytes_read`."""
        return self._along(index, self._bits)

    def seconds(self, index: float) -> float:
        """Seconds of one token, or of one sample, at an index: measured at points, and in between by the bytes read.

        Raises:
            BudgetError: nothing was timed, or the index is not on the frontier.
        """
        return self._along(index, self._seconds)

    def batch_seconds(self, index: float) -> float:
        """Seconds of a whole batch of held-out data at an index; errors as for `seconds`."""
        return self._along(index, self._batch_seconds)

    def encoded(self, index: int) -> EncodedLevels:
        """The levels of the map at an index, in two blocks of bytes in the order of sites; made once.

        Raises:
            BudgetError: the index is not on the frontier.
        """
        self._check(index)
        found = self._encoded.get(index)
        if found is None:
            found = self._encoded[index] = encoded_levels(self.maps[index])
        return found

    def find(self, wanted: str | Budget) -> int:
        """The index that a text or a budget means: the best map within the limit.

            chain.find("8")                           # the point of that name, or at most 8 bits a weight
            chain.find("800MiB"), chain.find("30ms")  # bytes in memory, seconds a token
            chain.find(fv.Budget(loss=0.01))          # the cheapest map with at most that divergence

        Args:
            wanted: the name of a point, else average bits of a weight as a number, bytes, or a time; or a budget. Bytes
                mean memory (`PrecisionMap.bytes_resident`), and a loss means the measured divergence.

        Raises:
            BudgetError: the text is none of these, no map is within the limit, or what the limit is of was not
                measured.
        """
        if isinstance(wanted, str):
            named = {point.name: point.index for point in self.points}
            if wanted in named:
                return named[wanted]
            wanted = self._budget_of(wanted)
        if not isinstance(wanted, Budget):
            raise BudgetError(f"wanted (={wanted!r}) is not a text such as '4.25', nor a Budget")
        if wanted.loss is not None:
            return self._within_loss(float(wanted.loss))
        if wanted.bits is not None:
            return self._first(self._bits, wanted.bits + _ROUNDING, "bits a weight", lambda bits: f"{bits:.2f}")
        if wanted.latency is not None:
            limit = float(wanted.latency) * (1 + 1e-9)
            return self._first(self._seconds, limit, "of time a token", format_seconds)
        return self._first(self._bytes_resident, float(wanted.bytes or 0), "in memory", format_bytes)

    def _budget_of(self, text: str) -> Budget:
        for attribute, parse in (("bits", float), ("bytes", parse_bytes), ("latency", parse_seconds)):
            try:
                return Budget(**{attribute: parse(text)})  # type: ignore[arg-type]
            except ValueError:  # BudgetError is one
                continue
        names = ", ".join(point.name for point in self.points) or "none"
        raise BudgetError(
            f"point (={text!r}) is not the name of a point ({names}), bits such as 4.25, bytes such as 800MiB, or a "
            "time such as 30ms"
        )

    def _first(self, values: tuple[float, ...], limit: float, what: str, say: Callable[[float], str]) -> int:
        for index, value in enumerate(values):
            if value <= limit:
                return index
        raise BudgetError(f"no map of the frontier takes {say(limit)} {what}: the least is {say(min(values))}")

    def _within_loss(self, limit: float) -> int:
        within = [i for i, value in enumerate(self._divergences) if value <= limit * (1 + 1e-9)]
        if not within:
            raise BudgetError(
                f"no map of the frontier loses as little as {limit:g}: the best measures {self.kl(0):.4g}"
            )
        return within[-1]

    def _check(self, index: float) -> None:
        if isinstance(index, bool) or not isinstance(index, (int, float)) or not 0 <= index <= len(self.maps) - 1:
            raise BudgetError(f"index (={index!r}) is not on the frontier, which has the indices 0 to {len(self) - 1}")

    def _along(self, index: float, values: tuple[float, ...]) -> float:
        self._check(index)
        low = math.floor(index)
        share = index - low
        return values[low] if not share else (1 - share) * values[low] + share * values[low + 1]

    @cached_property
    def _encoded(self) -> dict[int, EncodedLevels]:
        return {}

    @cached_property
    def _bits(self) -> tuple[float, ...]:
        return tuple(plan.bits for plan in self.maps)

    @cached_property
    def _bytes_read(self) -> tuple[float, ...]:
        return tuple(plan.bytes_read for plan in self.maps)

    @cached_property
    def _bytes_resident(self) -> tuple[float, ...]:
        return tuple(plan.bytes_resident for plan in self.maps)

    @cached_property
    def _divergences(self) -> tuple[float, ...]:
        """The divergence at every index, never falling."""
        if not self.points:
            raise BudgetError("the frontier was not measured: foveate.measure_frontier measures it on held-out data")
        predicted = [plan.predicted_loss for plan in self.maps]
        if not all(math.isfinite(loss) for loss in predicted):
            predicted = [-bits for bits in self._bits]
        places = list(accumulate(predicted, max))
        measured = ordered([point.divergence for point in self.points])
        at_points = [places[point.index] for point in self.points]
        return tuple(between(place, at_points, measured, ratios=True) for place in places)

    def _times(self, times: list[float | None], what: str) -> tuple[float, ...]:
        """The time at every index, never rising along the chain."""
        known = [time for time in times if time is not None]
        if not known or len(known) < len(times):
            raise BudgetError(f"the frontier has no times of {what}: foveate.measure_frontier(..., timed=True) has")
        rising = ordered(known[::-1])
        places = [self._bytes_read[point.index] for point in self.points][::-1]
        return tuple(between(place, places, rising) for place in self._bytes_read)

    @cached_property
    def _seconds(self) -> tuple[float, ...]:
        return self._times([point.seconds for point in self.points], "a token")

    @cached_property
    def _batch_seconds(self) -> tuple[float, ...]:
        return self._times([point.batch_seconds for point in self.points], "a batch")

    def unmeasured(self) -> Frontier:
        """The same maps without measurements."""
        return replace(self, points=(), unit="", machine="")


def point_name(plan: PrecisionMap) -> str:
    """What the point of a map is called: its level where all weights have one, else its average bits.

    point_name(profile.uniform(8))  # "8"
    """
    levels = {plan.levels[site.name] for site in plan.weight_sites()}
    if len(levels) == 1 and isinstance(level := levels.pop(), int):
        return str(level)
    return f"{plan.bits:.2f}"


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
