"""foveate bench trace at the smallest sizes: every figure is there, and no request is lost."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from foveate.errors import MissingExtraError
from foveate.kernels.backends.table import ensure_loaded
from foveate.serve.extras import require_serving

try:
    require_serving()
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import torch

from foveate.bench.importance import mixture
from foveate.bench.simulation.traces import FILES, Trace, read_trace
from foveate.bench.trace import Sizes, measure, requests

DATA = os.environ.get("FOVEATE_DATA")


def test_requests_are_those_of_the_trace_at_a_rate() -> None:
    trace = Trace(
        arrivals=tuple(float(i) for i in range(600)), prompts=(1000,) * 600, generated=tuple(range(1, 601))
    )  # ten minutes
    streams = [torch.full((4096,), text) for text in range(3)]
    asks = requests(trace, streams, Sizes(minutes=1.0, load=2.0, prompt=64, answer=32), carried=1.0)
    assert len(asks) == pytest.approx(120, abs=2)
    assert all(len(ask.prompt) == 64 for ask in asks)
    assert sum(ask.answer for ask in asks) / len(asks) == pytest.approx(32, rel=0.05)
    assert [ask.at for ask in asks] == sorted(ask.at for ask in asks)
    assert 55 < asks[-1].at <= 60
    texts = [ask.prompt[0] for ask in asks]
    assert texts == sorted(texts)  # one text after another
    assert set(texts) == {0, 1, 2}


@pytest.mark.skipif(DATA is None, reason="needs the texts and traces: set FOVEATE_DATA")
@pytest.mark.skipif(ensure_loaded().isa is None, reason="planes on disk need compiled kernels")
def test_it_serves_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = mixture.Recipe(experts=4, width=32, hidden=32, layers=1, heads=2, window=32, steps=4)
    monkeypatch.setattr("foveate.bench.trace.MIXTURE", small)
    monkeypatch.setattr("foveate.bench.trace.default_cache", lambda: tmp_path)
    assert len(read_trace(Path(str(DATA)) / "traces" / FILES["conversation"])) > 10_000
    found = measure(Sizes(minutes=0.1, prompt=8, answer=4, batch=4, window=24, load=0.5))
    assert found.figures["static_requests_lost"] == found.figures["requests_lost"] == 0
    assert found.figures["left_as_before"] == 1
    assert found.figures["manager_fault"] == 0
    assert 0 < found.figures["resident_least_over_most"] <= 1
    assert all(math.isfinite(value) for name, value in found.figures.items() if not name.startswith("chosen"))
