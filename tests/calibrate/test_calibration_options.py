"""Calibration options check themselves, and the arguments of `quantize` reach them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import foveate as fv
from foveate.calibrate.passes.options import CalibrationOptions
from tiny import mlp, rows


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        CalibrationOptions().progress = False  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        CalibrationOptions(fv.Logits())  # type: ignore[misc]


def test_an_objective_that_is_none_is_refused_and_the_model_is_left() -> None:
    model: Any = mlp()
    before = [type(module) for module in model.modules()]
    with pytest.raises(fv.DataError, match=r"objective \(='logits'\) is not an Objective, such as foveate.Logits\(\)"):
        fv.quantize(model, rows(), objective="logits", progress=False)  # type: ignore[arg-type]
    assert [type(module) for module in model.modules()] == before
