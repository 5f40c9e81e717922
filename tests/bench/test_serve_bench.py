"""foveate bench serve at the smallest sizes: every figure is there, and no request is lost."""

from __future__ import annotations

import math

import pytest

from foveate.errors import MissingExtraError
from foveate.serve.extras import require_serving

try:
    require_serving()
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from foveate.bench.serve import Sizes, measure


def test_it_measures_both_sides() -> None:
    sizes = Sizes(width=32, hidden=32, layers=1, heads=2, words=64, batches=(2, 8), seconds=0.5, rounds=1, answer=6)
    found = measure(sizes)
    assert found.figures["requests_lost"] == 0
    names = {"saturation_throughput_ratio", "step_overhead", "throughput_ratio_batch_2", "step_overhead_batch_8"}
    assert names <= set(found.figures)
    assert all(math.isfinite(value) and value >= 0 for value in found.figures.values())
    assert all(one[side]["tokens_per_second"] > 0 for one in found.rounds for side in ("static", "bent"))
