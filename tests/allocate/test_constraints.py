"""Constraints check themselves when they are made, and are the same value however their levels were ordered."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import foveate as fv


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        fv.Constraints().per_tile = False  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        fv.Constraints((2, 4))  # type: ignore[misc]


def test_what_it_holds_cannot_change_and_can_be_compared() -> None:
    levels, tie = [8, 2, 4, 4], [["*.q_proj:weight", "*.k_proj:weight"]]
    made = fv.Constraints(levels=levels, tie=tie, input_bits=6, input_levels=iter((8, 4)))  # type: ignore[arg-type]
    levels.append(5)
    tie[0].append("nothing")
    assert (made.levels, made.input_levels) == ((2, 4, 8), (4, 8))
    assert made.tie == (("*.q_proj:weight", "*.k_proj:weight"),)
    assert made == fv.Constraints(
        levels=(2, 4, 8), tie=(("*.q_proj:weight", "*.k_proj:weight"),), input_bits=6, input_levels=(4, 8)
    )
    assert hash(made) == hash(replace(made))
    assert replace(made, levels=(3,)).levels == (3,)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"levels": ()}, fv.BudgetError, "levels is empty: give at least one of 0, 2, 3, 4, 6, 8"),
        ({"levels": 4}, fv.BudgetError, "levels (=4) is not a sequence of levels, such as (2, 4, 8)"),
        ({"levels": (4, 5)}, fv.LevelError, "level (=5) is not one of 0, 2, 3, 4, 6, 8"),
        ({"per_tile": "no"}, fv.BudgetError, "per_tile (='no') is not True or False"),
        ({"tie": "*.q_proj:weight"}, fv.SiteError, "tie (='*.q_proj:weight') is not groups of patterns"),
        ({"tie": ["*.q_proj:weight"]}, fv.SiteError, "tie (=['*.q_proj:weight']) is not groups of patterns"),
        ({"tie": [(4,)]}, fv.SiteError, "tie (=[(4,)]) is not groups of patterns"),
        ({"input_level": 5}, fv.LevelError, "input level (=5) is not one of 4, 8, 16, 32"),
        ({"input_level": 8, "input_bits": 6}, fv.BudgetError, "give input_level or input_bits, not both"),
        ({"input_bits": -1}, fv.BudgetError, "input_bits (=-1) must be a positive finite number"),
        ({"input_bits": float("nan")}, fv.BudgetError, "input_bits (=nan) must be a positive finite number"),
        ({"input_bits": True}, fv.BudgetError, "input_bits (=True) must be a positive finite number"),
        ({"input_bits": 6, "input_levels": ()}, fv.BudgetError, "input_levels is empty: give at least one of 4, 8"),
        ({"input_bits": 6, "input_levels": (4, 6)}, fv.LevelError, "input level (=6) is not one of 4, 8, 16, 32"),
        ({"input_bits": 6, "input_levels": 4}, fv.BudgetError, "input_levels (=4) is not a sequence of levels"),
        ({"input_levels": (4,)}, fv.BudgetError, "input_levels are what input_bits chooses among: give input_bits too"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as refused:
        fv.Constraints(**given)
    assert str(refused.value).startswith(sentence)
