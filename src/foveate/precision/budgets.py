"""Budget: what a precision map may cost."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import BudgetError
from foveate.sizes import parse_bytes


@dataclass(frozen=True)
class Budget:
    """What a precision map may cost. Give exactly one of the attributes.

    Attributes:
        bytes: bytes in memory (`PrecisionMap.bytes_resident`), a number or `"800MiB"`.
        bits: average bits of a weight, scales included (`PrecisionMap.bits`).
        loss: the greatest loss that the profile may predict, in the objective's unit.
    """

    bytes: int | str | None = None
    bits: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("bytes", "bits", "loss") if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget is exactly one of bytes, bits, loss; given: {', '.join(given) or 'none'}")
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes(self.bytes))
        value = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BudgetError(f"budget {given[0]} (={value!r}) is not a number")
        if not value > 0 or value == float("inf"):
            raise BudgetError(f"budget {given[0]} (={value}) must be a positive finite number")
