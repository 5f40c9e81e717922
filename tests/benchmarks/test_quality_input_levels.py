"""The benchmark of inputs on a tiny model: its figures, its shifts and its simulated 6 bits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.models import cases
from benchmarks.models.resnet import ResNet
from benchmarks.quality import input_levels
from foveate.calibrate.quantize import quantize
from foveate.collect.objectives import Logits
from foveate.nn.levels import apply
from tiny import generator, mlp, rows


def _tiny() -> cases.Case:
    torch.manual_seed(0)
    images = list(torch.randn(12, 3, 8, 8).split(4))
    return cases.Case("tiny", ResNet(8).eval(), images, images, Logits(), "top1", lambda y, _: y[:, 0] * 0 + 1, "class")


def test_figures_of_a_tiny_model() -> None:
    case = _tiny()
    reference = copy.deepcopy(case.model)
    profile = quantize(case.model, case.calibration, objective=case.objective, progress=False)
    rounds = input_levels._levels(case, reference, profile)
    shifts = {name: [shift(b) for b in case.evaluation] for name, shift in input_levels.SHIFTS.items()}
    rounds += input_levels._drift(case, reference, profile, shifts)
    figures = input_levels._figures(rounds)
    wanted = {"agreement_tiny", "kl_over_uniform6_tiny", "kl_over_uniform6_worst", "input_bits_tiny"}
    wanted |= {"changes_without_shift", "recovered_worst_b6", "recovered_worst_b8", "recovered_tiny_jpeg_b8"}
    assert wanted <= set(figures)
    assert all(math.isfinite(v) for v in figures.values())
    assert figures["input_bits_tiny"] <= 6
    assert figures["changes_without_shift"] == sum(r["changes"] for r in rounds if r.get("shift") == "none")
    by_name = {(r["weights"], r["inputs"]): r["divergence"] for r in rounds if "shift" not in r}
    assert by_name["8 bits", "uniform 32"] < by_name["8 bits", "uniform 8"] < by_name["8 bits", "uniform 4"]


def test_without_data_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cases.VARIABLE, raising=False)
    measured = input_levels.measure()
    assert not measured.figures
    assert "FOVEATE_DATA is not set" in measured.notes[0]


@pytest.mark.parametrize("zero_point", [False, True])
def test_rows_are_rounded_to_so_many_codes(zero_point: bool) -> None:
    x = torch.randn(30, 200, generator=generator(0))
    rounded = input_levels.rounded_rows(x, 4, zero_point)
    codes = 16 if zero_point else 15
    assert max(len(row.unique()) for row in rounded) <= codes
    span = (x.amax(1) - x.amin(1)) / 15 if zero_point else x.abs().amax(1) / 7
    assert bool(((rounded - x).abs().amax(1) <= span * 1.001).all())
    assert torch.equal(input_levels.rounded_rows(torch.zeros(2, 3), 6, zero_point), torch.zeros(2, 3))


def test_simulated_inputs_at_many_bits_are_the_float_product() -> None:
    model = nn.Sequential(mlp(), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3))
    batches = rows(24, batches=1)
    profile = quantize(model, batches, objective=Logits(), progress=False)
    apply(model, profile.uniform(8, 32))
    exact = model(batches[0])
    with input_levels.rounded_inputs(model, 20, True):
        assert torch.allclose(model(batches[0]), exact, atol=1e-4)
    with input_levels.rounded_inputs(model, 2, False):
        assert not torch.allclose(model(batches[0]), exact, atol=1e-2)
    assert torch.equal(model(batches[0]), exact)


def test_shifts_are_images_still() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=generator(1))
    x = input_levels._normalised(pixels)
    assert torch.allclose(input_levels._pixels(x), pixels, atol=1e-6)
    for shift in input_levels.SHIFTS.values():
        shifted = input_levels._pixels(shift(x))
        assert float(shifted.min()) >= -1e-5
        assert float(shifted.max()) <= 1 + 1e-5
        assert float((shifted - pixels).abs().mean()) > 0.01
    # a finer table keeps more, and a plain picture is kept as it is
    near, far = (float((input_levels._pixels(input_levels.jpeg_like(x, q)) - pixels).abs().mean()) for q in (0.05, 4.0))
    assert near < far
    plain = input_levels._normalised(torch.full((1, 3, 8, 8), 0.5))
    assert torch.allclose(input_levels.jpeg_like(plain), plain, atol=1e-5)
