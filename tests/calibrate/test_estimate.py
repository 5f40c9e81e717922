"""The estimate of how long quantizing takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import foveate as fv
from foveate.calibrate.estimate import USUAL_SWEEPS, Estimate, Machine, Timed, estimate
from foveate.calibrate.passes import calibration
from foveate.calibrate.resuming import ResumeFile, sample_of
from foveate.calibrate.schedule import Schedule, WeightCost, further_passes
from foveate.calibrate.smallest_map import smallest_map
from foveate.collect.collector import Collector
from foveate.collect.kinds import find_weights
from foveate.kernels.backends.cpu.library import Status
from foveate.progress import in_words
from tiny import llama, mlp, rows, tokens


def _cost(
    rows: int, columns: int, *, last: int = 0, large: int = 1, gradients: bool = False, kept: int = 0
) -> WeightCost:
    return WeightCost(rows, columns, False, 4 * rows * columns, large, gradients, last, last, kept)


def test_rounding_grows_as_its_arithmetic_does() -> None:
    machine, often = Machine(value=1.0, code=3.0, row_term=0.5, flop=0.0), USUAL_SWEEPS + 1
    assert machine.rounding(_cost(5, 7), descends=False) == 35
    assert machine.rounding(_cost(5, 7), descends=True) == 35 * (1 + often * 3)
    # rows that are chosen jointly compensate each other's errors, in blocks of up to 512
    assert machine.rounding(_cost(5, 7, kept=1), descends=True) == 35 * (1 + often * (3 + 0.5 * 5))
    assert machine.rounding(_cost(4000, 7, kept=1), descends=True) == 28000 * (1 + often * (3 + 0.5 * 512))
    assert machine.rounding(_cost(576, 7, kept=1), descends=True) == 4032 * (1 + often * (3 + 0.5 * 288))
    products = Machine(value=0.0, code=0.0, row_term=0.0, flop=1.0)
    assert products.rounding(_cost(5, 10), descends=True) == 2 * (5 * USUAL_SWEEPS + 6) * 5 * 100


def test_a_machine_is_measured() -> None:
    machine = Machine.measured()
    assert all(v >= 0 for v in (machine.value, machine.code, machine.row_term))
    assert 0 < machine.flop < 1e-6


def test_passes_are_counted_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "measured", lambda: Machine(value=1.0, code=3.0, row_term=0.5, flop=0.0))
    costs = [_cost(4, 4, last=i) for i in range(4)]
    schedule = Schedule(False, ((3,), (2,), (1,), (0,)), True, 0)
    found = further_passes(costs, schedule)
    assert found.with_gradients == 0
    assert found.forward_only == pytest.approx(1.2 * (3 + 2 + 1) / 4)
    backward = [_cost(4, 4, last=i, gradients=True) for i in range(4)]
    assert further_passes(backward, schedule).with_gradients == 3
    got = estimate(costs, [9.0] * 4, schedule, Timed(2.0, 0.5, 10, 64))
    assert got.passes == pytest.approx(10 * (2.0 + 0.5 * 1.8))
    # all batches again at five levels, or as many as have 2048 samples; and one before
    assert got.comparing == pytest.approx((10 * 5 + 1) * 0.5)
    assert estimate(costs, [9.0] * 4, schedule, Timed(2.0, 0.5, 10, 512)).comparing == pytest.approx((4 * 5 + 1) * 0.5)
    unknown = estimate(costs, [9.0] * 4, schedule, Timed(2.0, 0.5, None, 64))
    assert math.isnan(unknown.passes)
    assert "2 s a batch" in str(unknown)


def test_words() -> None:
    assert [in_words(s) for s in (4.4, 99, 120, 5000, 7200)] == ["4 s", "99 s", "2 min", "83 min", "2.0 h"]
    assert str(Estimate(60, 1, 300)) == "this takes about 6 min: going through the data 60 s, rounding 5 min"
    assert "through the data 3 times 60 s," in str(Estimate(60, 1, 300, 3))


def test_the_estimate_goes_to_stderr_and_can_be_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fv.quantize(mlp(), rows())
    assert capsys.readouterr().err == ""  # no time at all
    monkeypatch.setattr(calibration, "_WORTH_SAYING", 0.0)
    fv.quantize(mlp(), rows())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "this takes about" in captured.err
    assert "rounding" in captured.err
    fv.quantize(mlp(), rows(), progress=False)
    assert capsys.readouterr().err == ""


def test_all_batches_that_are_left_are_expected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Timed] = []

    def noted(costs: Any, inputs: Sequence[float], schedule: Schedule, timed: Timed) -> Estimate:
        seen.append(timed)
        return Estimate(60, timed.batch, 300)

    monkeypatch.setattr(calibration, "_WORTH_SAYING", 0.0)
    monkeypatch.setattr(calibration, "estimate", noted)
    batches = rows(batches=7)
    fv.quantize(mlp(), batches)
    fv.quantize(mlp(), iter(batches))
    assert [timed.batches for timed in seen] == [7, None]
    model, file = mlp(), tmp_path / "resume"
    resumed = Collector(find_weights(model), fv.Logits())
    for batch in batches[:4]:
        resumed.add(model, batch)
    sample = sample_of(model, batches[0])
    ResumeFile(path=file, objective=fv.Logits(), sample=sample).write(resumed.state())
    fv.quantize(model, batches, resume=file, objective=fv.Logits())
    assert seen[-1].batches == 3


def test_the_smallest_map_is_not_above_any() -> None:
    model = llama()
    least = smallest_map(model)
    profile = fv.quantize(model, tokens(), progress=False)
    lowest = profile.uniform(2)
    assert 0.9 * lowest.bytes_resident < least.bytes_resident <= lowest.bytes_resident
    assert 0.9 * lowest.bits < least.bits <= lowest.bits


def test_without_kernels_little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []

    def watched(rows: int, sweeps: int, gradients_BRR: Tensor | None = None) -> None:
        swept.append(sweeps)

    monkeypatch.setattr("foveate.calibrate.estimate._round", watched)
    monkeypatch.setattr("foveate.calibrate.estimate.ensure_loaded", lambda: Status(None, "", None))
    assert Machine.measured().row_term == 0
    assert max(swept) == 1
