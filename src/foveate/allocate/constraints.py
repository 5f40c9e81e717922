"""Constraints: what a map must keep to besides its budget, as one value for `allocate`, `frontier`, `fit_to_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import BudgetError, SiteError
from foveate.formats.levels import (
    EXACT_LEVELS,
    INPUT_LEVELS,
    NESTED_LEVELS,
    TILE_LEVELS,
    check_input_level,
    check_tile_level,
)

INPUT_CHOICE = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a map must keep to besides its budget. The value is frozen; its levels are in ascending order.

        plan = fv.allocate(profile, fv.Budget(bits=4.25), fv.Constraints(levels=(2, 4, 8), input_bits=6.0))

    Attributes:
        levels: the levels of weights to choose among; with level 0, tiles may be dropped. Levels 16 and 32 are of tiles
            whose exact values were kept (`fv.quantize(..., exact=0.01)`), and count for no others.
        per_tile: whether levels may differ within a weight: each tile, or each strip of 16 rows, has its own.
        tie: groups of shell patterns; the weights that match a group share one level. `[("*.q_proj:weight",
            "*.k_proj:weight")]`.
        input_level: the level of every input, 4, 8, 16 or 32; by default it follows from the weight's level.
        input_bits: the largest average of input bits, over the values that products read. Each input gets a level so
            that the loss measured in the profile is least (or see `foveate.variance_proxy`). On a CPU, levels below 8
            save no time.
        input_levels: the levels to choose among for `input_bits`.

    Raises:
        BudgetError: there are no levels; `input_bits` is not a positive number, or is given with `input_level`;
            `input_levels` are given without `input_bits`.
        LevelError: weights or inputs cannot have one of the levels.
        SiteError: `tie` is not a sequence of groups of patterns.
    """

    levels: Sequence[int] = (*NESTED_LEVELS, *EXACT_LEVELS)
    per_tile: bool = True
    tie: Sequence[Sequence[str]] = ()
    input_level: int | None = None
    input_bits: float | None = None
    input_levels: Sequence[int] = INPUT_CHOICE

    def __post_init__(self) -> None:
        levels = _each("levels", self.levels)
        input_levels = _each("input_levels", self.input_levels)
        if not levels:
            raise BudgetError(f"levels is empty: give at least one of {', '.join(map(str, TILE_LEVELS))}")
        if type(self.per_tile) is not bool:
            raise BudgetError(f"per_tile (={self.per_tile!r}) is not True or False")
        if self.input_level is not None:
            check_input_level(self.input_level)
            if self.input_bits is not None:
                raise BudgetError("give input_level or input_bits, not both")
        if self.input_bits is None and input_levels != INPUT_CHOICE:
            raise BudgetError("input_levels are what input_bits chooses among: give input_bits too, or input_level")
        if not input_levels:
            raise BudgetError(f"input_levels is empty: give at least one of {', '.join(map(str, INPUT_LEVELS))}")
        if self.input_bits is not None and not _is_positive(self.input_bits):
            raise BudgetError(f"input_bits (={self.input_bits}) must be a positive finite number")
        self._set("levels", tuple(sorted({check_tile_level(level) for level in levels})))
        self._set("input_levels", tuple(sorted({check_input_level(level) for level in input_levels})))
        self._set("tie", _groups(self.tie))

    def _set(self, name: str, value: tuple[Any, ...]) -> None:
        object.__setattr__(self, name, value)


def check_constraints(constraints: Constraints) -> None:
    """Raise `BudgetError` for what is no `Constraints`."""
    if not isinstance(constraints, Constraints):
        raise BudgetError(f"constraints (={constraints!r}) are not Constraints, such as Constraints(levels=(2, 4, 8))")


def _each(name: str, levels: Any) -> tuple[int, ...]:
    try:
        return tuple(levels)
    except TypeError:
        raise BudgetError(f"{name} (={levels!r}) is not a sequence of levels, such as (2, 4, 8)") from None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _groups(tie: Any) -> tuple[tuple[str, ...], ...]:
    """The groups as tuples. A string in place of a group is refused: each letter would count as a pattern."""
    groups = tie if isinstance(tie, (list, tuple)) else None
    if groups is None or not all(
        isinstance(group, (list, tuple)) and all(isinstance(pattern, str) for pattern in group) for group in groups
    ):
        raise SiteError(f"tie (={tie!r}) is not groups of patterns, such as [('*.q_proj:weight', '*.k_proj:weight')]")
    return tuple(map(tuple, groups))


#: All levels above 0, levels that differ within a weight, and input levels that follow from the weights.
DEFAULT_CONSTRAINTS = Constraints()
