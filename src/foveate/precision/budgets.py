"""Budget: what a precision map may cost."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import BudgetError
from foveate.sizes import parse_bytes, parse_seconds


@dataclass(frozen=True)
class Budget:
    """What a precision map may cost. Give exactly one of the attributes.

        fv.allocate(profile, fv.Budget(bits=4.25))
        chain.find(fv.Budget(latency="30ms"))

    Attributes:
        bytes: bytes in memory (`PrecisionMap.bytes_resident`), a number or `"800MiB"`.
        bits: average bits of a weight, scales included (`PrecisionMap.bits`).
        loss: the greatest loss that the profile may predict, in the objective's unit.
        latency: seconds a token, or a sample of a model without tokens, one at a time: a number or `"30ms"`. It needs
            times of this machine (`foveate.measure_timings`).
        energy: joules a token. No budget of energy is accepted yet: foveate has neither a sensor nor a model of energy.
    """

    bytes: int | str | None = None
    bits: float | None = None
    loss: float | None = None
    latency: float | str | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        names = ("bytes", "bits", "loss", "latency", "energy")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget is exactly one of {', '.join(names)}; given: {', '.join(given) or 'none'}")
        if self.energy is not None:
            raise BudgetError(
                f"energy (={self.energy!r}) cannot be a budget: neither a sensor nor a model of joules a token exists "
                "here; give latency, which follows the bytes that a token reads"
            )
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes(self.bytes))
        if self.latency is not None:
            object.__setattr__(self, "latency", parse_seconds(self.latency))
        value = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BudgetError(f"budget {given[0]} (={value!r}) is not a number")
        if not value > 0 or value == float("inf"):
            raise BudgetError(f"budget {given[0]} (={value}) must be a positive finite number")
