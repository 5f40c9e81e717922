"""Costs, Policy and Setup: what each index costs, the constants of the controller, and both with the limits.

Of the constants, the price of congestion was chosen on the Azure conversation trace of 2023, in the simulation of
`foveate bench runtime`; docs/decisions.md has the settings that were compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from foveate.errors import DataError
from foveate.runtime.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What each index of a frontier costs. Index 0 is the best.

        Costs(kl=(0.0, 0.01, 0.2), seconds_per_token=(0.04, 0.03, 0.02))

    Attributes:
        kl: the expected KL from the original at each index, nats a token.
        seconds_per_token: the time of one token alone at each index; empty if it is not known.
        prefill_seconds: the time of one token of a prompt at each index; empty if it is not known.
        resident: the bytes in memory at each index where planes beyond it are given back; empty if none are.

    Raises:
        DataError: the lengths differ, or a number is not finite, or negative, or a time is 0.
    """

    kl: tuple[float, ...]
    seconds_per_token: tuple[float, ...] = ()
    prefill_seconds: tuple[float, ...] = ()
    resident: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.kl:
            raise DataError("costs are of at least one index")
        for name in ("kl", "seconds_per_token", "prefill_seconds", "resident"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values))
            if values and len(values) != len(self.kl):
                raise DataError(f"costs name {len(values)} numbers of {name} for {len(self.kl)} indices")
            positive = "seconds" in name
            if any(not math.isfinite(v) or v < 0 or (positive and v == 0) for v in values):
                raise DataError(
                    f"costs of {name} (={values}) are not all finite and {'above 0' if positive else '>= 0'}"
                )

    def __len__(self) -> int:
        return len(self.kl)

    def speed(self, index: int) -> float:
        """The time of a token at an index over that at index 0; 1 if times are not known."""
        return self.seconds_per_token[index] / self.seconds_per_token[0] if self.seconds_per_token else 1.0

    def affordable(self, allowed: float) -> int:
        """The furthest index up to which every index costs at most `allowed` nats; 0 if none does."""
        worst = accumulate(self.kl, max)
        return max(sum(kl <= allowed for kl in worst) - 1, 0)


#: A step that saves less of the time than this factor, and loses more KL than that one, is behind the knee.
_LITTLE, _MUCH = 1.05, 1.5
#: All steps behind the knee save less of the time than this factor.
_ALL = 1.2


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The constants of the controller. Times are seconds.

    Attributes:
        patience: how long a signal must stay above its limit before precision falls.
        dwell_down: the least time from a switch to a lower precision that follows.
        dwell_up: the least time from a switch to a higher precision that follows; also the first hold.
        longest_hold: the most that the hold grows to.
        lower: the share of its limit that a signal must stay below for precision to rise.
        steps_up: by how many indices precision rises at once, at most.
        price: what is paid for one unit of congestion (`foveate.runtime.signals`), where the load is known, in units of
            the KL at the knee (`Setup.knee`). A higher price leaves more room for bursts.
        deadband: the relative error of power that is taken for none.
        power_gain: indices a second for a relative error of 1 in power.
        stale_after: the age at which a reading is stale.
        fault_hold: how long a sensor's fault is waited out before the safe index is taken.
        safe_index: the index that is taken when a sensor stays at fault; None is the furthest index allowed.
        gap: a step of the clock that is longer than this is a suspension, and all timers start anew.
        burst: how many passes' worth of `Limits.quality` can be saved up.
    """

    patience: float = 0.3
    dwell_down: float = 0.25
    dwell_up: float = 3.0
    longest_hold: float = 60.0
    lower: float = 0.5
    steps_up: int = 1
    price: float = 2.0
    deadband: float = 0.03
    power_gain: float = 0.5
    stale_after: float = 2.0
    fault_hold: float = 2.0
    safe_index: int | None = None
    gap: float = 5.0
    burst: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("dwell_down", "dwell_up", "longest_hold", "power_gain", "stale_after", "gap", "burst"):
            if not (0 < getattr(self, name) < math.inf):
                raise DataError(f"{name} (={getattr(self, name)}) is not a positive finite number")
        for name in ("patience", "deadband", "fault_hold", "price"):
            if not (0 <= getattr(self, name) < math.inf):
                raise DataError(f"{name} (={getattr(self, name)}) is not a finite number of at least 0")
        if not 0 < self.lower <= 1:
            raise DataError(f"lower (={self.lower}) is not above 0 and at most 1")
        if self.longest_hold < self.dwell_up:
            raise DataError(f"longest_hold (={self.longest_hold}) is less than dwell_up (={self.dwell_up})")
        if self.steps_up < 1:
            raise DataError(f"steps_up (={self.steps_up}) is less than 1")
        if self.safe_index is not None and self.safe_index < 0:
            raise DataError(f"safe_index (={self.safe_index}) is negative")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a controller knows beforehand.

    Attributes:
        limits: what may be taken.
        costs: what each index costs.
        policy: the constants.
        floor: the furthest index that is allowed; None is the last.
        frees_memory: whether a move to a lower precision gives memory back. If not, `Limits.memory` gates admission.
    """

    limits: Limits
    costs: Costs
    policy: Policy = field(default_factory=Policy)
    floor: int | None = None
    frees_memory: bool = False

    def __post_init__(self) -> None:
        if self.floor is not None and not 0 <= self.floor < len(self.costs):
            raise DataError(f"floor (={self.floor}) is not an index of a frontier of {len(self.costs)} maps")
        if self.frees_memory and not self.costs.resident:
            raise DataError("memory is given back along the frontier, but the costs do not say its resident bytes")

    @cached_property
    def given(self) -> dict[str, float]:
        """The limits of signals (`Limits.given`)."""
        return self.limits.given()

    @property
    def last(self) -> int:
        """The furthest index that is allowed."""
        return len(self.costs) - 1 if self.floor is None else self.floor

    @cached_property
    def knee(self) -> int:
        """The furthest index that is worth its loss where work waits: each step behind it saves less than 5 % of the
        time and loses half as much again, at the least, and all of them save less than 20 %. The last one where no
        times are known.
        """
        kl, at, speed = self.costs.kl, self.last, self.costs.speed
        if not self.costs.seconds_per_token:
            return at
        while at and kl[at] >= _MUCH * kl[at - 1]:
            if speed(at - 1) > min(_LITTLE * speed(at), _ALL * speed(self.last)):
                break
            at -= 1
        return at

    @property
    def safe(self) -> int:
        """The index that is taken when a sensor stays at fault."""
        wanted = self.policy.safe_index
        return self.last if wanted is None else min(wanted, self.last)
