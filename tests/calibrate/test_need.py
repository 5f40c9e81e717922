"""How many rows calibration needs, and that the command asks for as many."""

from __future__ import annotations

import pytest

from foveate.calibrate.need import LEAST_ROWS, ROWS_PER_INPUT, rows_needed
from foveate.calibrate.smallest_map import widths_of
from foveate.rounding import overfit_factor
from tiny import llama


def test_the_widest_layer_decides() -> None:
    assert rows_needed([576, 1536]) == 18432
    assert rows_needed([64, 172]) == LEAST_ROWS
    assert rows_needed([]) == LEAST_ROWS


def test_codes_gain_little_by_chance() -> None:
    """A third of the directions of a wide layer are ones in which its inputs vary."""
    assert overfit_factor(1 / 3 / ROWS_PER_INPUT) == pytest.approx(1.06, abs=0.015)


def test_widths_are_those_of_the_weights() -> None:
    model = llama()
    widths = widths_of(model)
    assert max(width for width, embedding in widths if not embedding) == model.config.intermediate_size
    assert any(embedding for _, embedding in widths)
