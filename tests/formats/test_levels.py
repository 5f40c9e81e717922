from __future__ import annotations

import pytest

from foveate.errors import LevelError
from foveate.formats.levels import (
    check_input_level,
    check_tile_level,
    check_weight_level,
    code_range,
    code_step,
    planes_of,
)


@pytest.mark.parametrize(
    ("level", "reach", "top", "step"),
    [
        (2, 0, 3, 4.0),
        (3, 0, 7, 2.0),
        (4, 0, 15, 1.0),
        (2, 2, 3, 4.0),
        (3, 1, 7, 2.0),
        (4, 2, 15, 1.0),
        (6, 0, 63, 0.25),
        (6, 1, 33, 0.5),
        (6, 2, 18, 1.0),
        (8, 0, 255, 0.0625),
        (8, 1, 135, 0.125),
        (8, 2, 75, 0.25),
        (6, 3, 48, 1 / 3),
        (8, 3, 195, 1 / 12),
    ],
)
def test_ranges_and_steps_are_those_of_the_format(level: int, reach: int, top: int, step: float) -> None:
    assert code_range(level, reach) == top
    assert code_step(level, reach) == step
    assert top <= 255


def test_without_reach_every_level_spans_the_same_range() -> None:
    # C + 1 steps cover 16 steps of 4 bits, whatever the level
    assert {(code_range(level, 0) + 1) * code_step(level, 0) for level in (2, 3, 4, 6, 8)} == {16.0}


def test_planes_of_each_level() -> None:
    assert [planes_of(level) for level in (0, 2, 3, 4, 6, 8)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("level", [1, 5, 7, -1, 9, 64])
def test_an_unknown_weight_level_names_the_rule(level: int) -> None:
    with pytest.raises(LevelError, match=rf"level \(={level}\) is not one of 0, 2, 3, 4, 6, 8"):
        check_weight_level(level)


@pytest.mark.parametrize("level", [16, 32])
def test_planes_give_no_exact_level(level: int) -> None:
    with pytest.raises(LevelError, match="planes give no exact level"):
        check_weight_level(level)
    assert check_tile_level(level) == level


def test_input_levels() -> None:
    assert [check_input_level(level) for level in (4, 8, 16, 32)] == [4, 8, 16, 32]
    with pytest.raises(LevelError, match=r"input level \(=2\) is not one of 4, 8, 16, 32"):
        check_input_level(2)
