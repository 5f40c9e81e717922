"""Options check themselves when they are made, and errors name the value and the rule."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import foveate as fv
from foveate.activations.policy.options import Settings


@pytest.mark.parametrize(("kind", "name"), [(fv.ActivationOptions, "seed"), (Settings, "error")])
def test_they_are_frozen_and_keyword_only(kind: type[Any], name: str) -> None:
    given = {"error": 0.1} if kind is Settings else {}
    with pytest.raises(FrozenInstanceError):
        setattr(kind(**given), name, 1)
    with pytest.raises(TypeError, match="positional"):
        kind(0.1)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"granularity": "layer"}, fv.BudgetError, "granularity (='layer') is not a Granularity, such as foveate.Gran"),
        ({"default": 3}, fv.LevelError, "level (=3) is not one of 2, 4, 8, 16, 32"),
        ({"default": 8.0}, fv.LevelError, "level (=8.0) is not one of 2, 4, 8, 16, 32"),
        ({"profile_every": 0}, fv.BudgetError, "profile_every (=0) must be a whole number of at least 1"),
        ({"audit_every": 1.5}, fv.BudgetError, "audit_every (=1.5) must be a whole number of at least 1"),
        ({"window": -1}, fv.BudgetError, "window (=-1) must be a whole number of at least 1"),
        ({"probes": True}, fv.BudgetError, "probes (=True) must be a whole number of at least 1"),
        ({"group": 48}, fv.BudgetError, "group (=48) must be a multiple of 32 from 32 to 1024"),
        ({"group": 2048}, fv.BudgetError, "group (=2048) must be a multiple of 32 from 32 to 1024"),
        ({"group": 64.0}, fv.BudgetError, "group (=64.0) must be a multiple of 32 from 32 to 1024"),
        ({"smallest": -1}, fv.BudgetError, "smallest (=-1) must be a whole number of at least 0"),
        ({"recompute": 1}, fv.BudgetError, "recompute (=1) is not True or False"),
        ({"seed": None}, fv.BudgetError, "seed (=None) is not a whole number"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as refused:
        fv.ActivationOptions(**given)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({}, fv.BudgetError, "give one of error=, bytes= and levels="),
        ({"error": 0.1, "bytes": 100}, fv.BudgetError, "give one of error=, bytes= and levels="),
        ({"error": 0}, fv.BudgetError, "error (=0) must be a number above 0"),
        ({"error": float("inf")}, fv.BudgetError, "error (=inf) must be a number above 0"),
        ({"error": "0.1"}, fv.BudgetError, "error (='0.1') must be a number above 0"),
        ({"bytes": 0}, fv.BudgetError, "bytes (=0) must be a whole number of at least 1"),
        ({"levels": {"*.mlp.*": 3}}, fv.LevelError, "level (=3) is not one of 2, 4, 8, 16, 32"),
        ({"levels": [4]}, fv.LevelError, "levels (=[4]) is no level, and no mapping of patterns of sites to levels"),
        ({"error": 0.1, "relative_to": "each"}, fv.BudgetError, "relative_to (='each') is not a Relative, such as"),
        ({"error": 0.1, "options": None}, fv.BudgetError, "options (=None) are not ActivationOptions, such as"),
    ],
)
def test_targets_that_make_no_sense(given: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as refused:
        Settings(**given)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("target", "default", "level"),
    [
        ({"error": 0.1}, None, 8),
        ({"error": 0.009}, None, 16),
        ({"bytes": 1000}, None, 4),
        ({"levels": {"*": 4}}, None, 8),
        ({"bytes": 1000}, 2, 2),
        ({"error": 0.009}, 32, 32),
    ],
)
def test_the_level_before_anything_is_measured(target: dict[str, Any], default: int | None, level: int) -> None:
    assert Settings(**target, options=fv.ActivationOptions(default=default)).default == level


def test_levels_that_are_changed_afterwards_change_nothing() -> None:
    levels = {"*": 4}
    settings = Settings(levels=levels)
    levels["*"] = 3
    assert settings.levels == {"*": 4}
