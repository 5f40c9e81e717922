"""Reading: what a sensor said, when, or why it said nothing. A sensor that is not there never reads as zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from foveate.errors import DataError

#: The signals that a controller knows, and the unit of each.
UNITS = {
    "queue_wait": "s",
    "latency": "s",
    "load": "",
    "memory": "B",
    "memory_pressure": "",
    "cpu_pressure": "",
    "power": "W",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One answer of a sensor: a value, or the reason why there is none.

        Reading(value=0.2, at=12.5)
        Reading(reason="there is no /sys/class/powercap", at=12.5)

    Attributes:
        value: in the unit of its signal (`UNITS`); None if it is unavailable. It may be wrong (NaN, negative): whoever
            uses it calls `fault`.
        at: the time at which it was taken, in seconds of the manager's clock.
        reason: why it is unavailable, as a clause; empty if it is available.
    """

    value: float | None = None
    at: float = 0.0
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.reason):
            raise DataError(f"a reading has a value or a reason, not both: value={self.value}, reason={self.reason!r}")

    def fault(self, now: float, stale_after: float) -> str:
        """Why this reading cannot be used, as a clause; empty if it can.

        Args:
            now: the present time.
            stale_after: the greatest age of a reading, in seconds.
        """
        if self.value is None:
            return self.reason
        if not math.isfinite(self.value) or self.value < 0:
            return f"its value (={self.value}) is not a finite number of at least 0"
        if now - self.at > stale_after:
            return f"its last value is {now - self.at:.1f} s old"
        return ""


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A source of one signal.

    Attributes:
        signal: a name of `UNITS`.
        read: returns the value now, or a sentence (a string) that says why there is none.
        frozen_after: seconds after which one and the same value is taken for a fault; None if the value may rest.
    """

    signal: str
    read: Callable[[], float | str]
    frozen_after: float | None = None

    def __post_init__(self) -> None:
        if self.signal not in UNITS:
            raise DataError(f"signal (={self.signal!r}) is not one of {', '.join(UNITS)}")
        if not callable(self.read):
            raise DataError(f"the sensor of {self.signal} (={self.read!r}) is not a function")
        if self.frozen_after is not None and not self.frozen_after > 0:
            raise DataError(f"frozen_after (={self.frozen_after}) is not a positive number of seconds")
