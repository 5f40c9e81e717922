"""Limits: what a running model may take of its machine, and how much loss it may spend."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from foveate.errors import BudgetError
from foveate.sizes import parse_bytes

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_WATTS = {"mW": 1e-3, "W": 1.0, "kW": 1e3}
_SHARES = {"": 1.0, "%": 0.01}
_NATS = {"": 1.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a running model may take. Each limit is optional; what is not given is not watched.

        fv.Limits(memory="6GiB", power="45W", queue_wait="200ms")
        fv.Limits(latency=0.05, quality=0.02)

    Attributes:
        memory: resident bytes of this process, a number or `"6GiB"`.
        power: watts of the machine, a number or `"45W"`.
        queue_wait: seconds that the first in the queue has waited, a number or `"200ms"`.
        latency: seconds that one pass of the model takes, a number or `"50ms"`.
        cpu_pressure: the share of time in which some process waits for a CPU, 0 to 1, or `"20%"`.
        memory_pressure: the share of time in which some process waits for memory, 0 to 1, or `"5%"`.
        quality: the mean expected KL of a pass, in nats. A token bucket enforces it, also against all other limits.

    Raises:
        BudgetError: a limit is not a positive number with a unit of its kind, or no limit is given.
    """

    memory: int | str | None = None
    power: float | str | None = None
    queue_wait: float | str | None = None
    latency: float | str | None = None
    cpu_pressure: float | str | None = None
    memory_pressure: float | str | None = None
    quality: float | str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            if isinstance(self.memory, bool):
                raise BudgetError(f"limit memory (={self.memory}) is not a number of bytes")
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        units = {
            "power": _WATTS,
            "queue_wait": _SECONDS,
            "latency": _SECONDS,
            "cpu_pressure": _SHARES,
            "memory_pressure": _SHARES,
            "quality": _NATS,
        }
        for name, known in units.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _parse(name, getattr(self, name), known))
        given = self.given()
        if not given and self.quality is None:
            raise BudgetError("there is no limit: give at least one, such as Limits(queue_wait='200ms')")
        for name, value in given.items():
            if not (value > 0 and math.isfinite(value)):
                raise BudgetError(f"limit {name} (={value}) is not a positive finite number")
        for name in ("cpu_pressure", "memory_pressure"):
            if given.get(name, 0.0) > 1:
                raise BudgetError(f"limit {name} (={given[name]}) is a share of time: at most 1, or 100%")
        if self.quality is not None and not 0 <= self.allowed_kl < math.inf:
            raise BudgetError(f"limit quality (={self.quality}) is not a finite number of at least 0")

    def given(self) -> dict[str, float]:
        """The limits of signals that were given, in the units of `foveate.runtime.readings.UNITS`; not `quality`."""
        names = ("memory", "power", "queue_wait", "latency", "cpu_pressure", "memory_pressure")
        return {name: float(getattr(self, name)) for name in names if getattr(self, name) is not None}

    @property
    def allowed_kl(self) -> float:
        """The mean expected KL of a pass that is allowed, in nats; infinite if `quality` is not given."""
        return math.inf if self.quality is None else float(self.quality)

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Limits as a command line writes them.

            fv.Limits.parse("queue_wait=200ms,power=45W")

        Raises:
            BudgetError: the text is not NAME=VALUE,...
        """
        values: dict[str, str] = {}
        for word in text.split(","):
            name, equals, value = (part.strip() for part in word.partition("="))
            if not equals or name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise BudgetError(f"limit {word.strip()!r} is not NAME=VALUE with one of the names {known}")
            if name in values:
                raise BudgetError(f"limit {name} is given twice")
            values[name] = value
        memory: int | str | None = values.pop("memory", None)
        if isinstance(memory, str) and memory.isdigit():
            memory = int(memory)
        return cls(memory=memory, **values)


def _parse(name: str, value: float | str, units: dict[str, float]) -> float:
    """A number, or a number with one of the units."""
    example = f"0.2{next(iter(units))}" if "" not in units else "0.2"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    number = r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?|\.[0-9]{1,30})\s*([A-Za-z%]*)\s*"
    match = re.fullmatch(number, value) if isinstance(value, str) else None
    # a bare number in a string is in the unit itself
    unit = None if match is None else units.get(match[2], 1.0 if match[2] == "" else None)
    if match is None or unit is None:
        raise BudgetError(f"limit {name} (={value!r}) is not a number like {example}")
    return float(match[1]) * unit
