"""Calibration data and weights at the edges: the right result, or a clear message."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import DataError
from foveate.formats.levels import INPUT_LEVELS, WEIGHT_LEVELS
from tiny import llama, mlp, rows, tokens


def _error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        got, expected = model(x), original(x)
    return float((got - expected).norm() / expected.norm())


def _sound(profile: fv.Profile) -> None:
    """Every table is finite and not negative, and a map can be allocated from it."""
    for name, table in profile.losses.items():
        levels = WEIGHT_LEVELS if name.endswith(":weight") else INPUT_LEVELS
        assert table.shape[1] == len(levels), name
        assert bool(torch.isfinite(table).all()), name
        assert bool((table >= 0).all()), name
    for bits in (4, 6):
        plan = fv.allocate(profile, fv.Budget(bits=profile.uniform(bits).bits))
        assert plan.predicted_loss <= profile.predict(fv.uniform_of_bytes(plan)) * (1 + 1e-6)


@pytest.mark.parametrize("batches", [[], iter(()), (b for b in ())])
def test_no_batches(batches: Any) -> None:
    with pytest.raises(DataError, match="there are no batches to calibrate on"):
        fv.quantize(mlp(), batches, progress=False)


@pytest.mark.parametrize("one", [torch.zeros(8, 70), {"x": torch.zeros(8, 70)}, "text"])
def test_one_batch_is_no_sequence_of_batches(one: Any) -> None:
    model = mlp()
    with pytest.raises(DataError, match=r"if that is one batch, give \[batch\]"):
        fv.quantize(model, one, progress=False)
    profile = fv.quantize(model, rows(8, batches=1), progress=False)
    with pytest.raises(DataError, match=r"give \[batch\]"):
        fv.verify(model, profile.uniform(4), one, progress=False)


@pytest.mark.parametrize("objective", [fv.Logits(), fv.Embedding()])
def test_an_empty_batch(objective: fv.Objective) -> None:
    with pytest.raises(DataError, match="batch 1 holds no samples"):
        fv.quantize(mlp(), [*rows(8, batches=1), torch.zeros(0, 70)], objective=objective, progress=False)


class _Sorting(nn.Module):
    """A mixture of the old kind: every expert is called, also with no rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(20, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mine = (x[:, 0] > 0).long()  # the last expert gets nothing
        order = mine.argsort(stable=True)
        y = torch.cat([expert(x[mine == i]) for i, expert in enumerate(self.experts)])
        return torch.empty_like(y).index_copy(0, order, y)


def test_a_layer_that_is_called_without_rows() -> None:
    profile = fv.quantize(_Sorting(), rows(64, 20), objective=fv.Logits(), progress=False)
    assert "calibration never reached experts.2: their bits are chosen blindly" in profile.notes
    _sound(profile)


@pytest.mark.parametrize("objective", [fv.Logits(), fv.Embedding()])
def test_one_sample(objective: fv.Objective) -> None:
    model = mlp()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(1, batches=1), objective=objective, progress=False)
    assert profile.samples == 1
    _sound(profile)
    fv.apply(model, profile.uniform(8))
    assert _error(model, original, rows(64, batches=1, seed=5)[0]) < 0.03


def test_one_token() -> None:
    model = llama()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, [{"input_ids": torch.tensor([[5]])}], progress=False)
    assert profile.samples == 1
    _sound(profile)
    (outcome, _) = fv.measure(model, [profile.uniform(8)], tokens(seed=3), reference=original, progress=False)
    assert outcome.divergence < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_number_in_a_late_batch(bad: float) -> None:
    batches = rows(64, batches=4)
    batches[2][3, 5] = bad
    model = mlp()
    kinds = [type(m) for m in model]
    with pytest.raises(DataError, match="batch 2 gives a loss that is not finite"):
        fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    assert [type(m) for m in model] == kinds
    # without it the same model goes through
    _sound(fv.quantize(model, batches[:2], objective=fv.Logits(), progress=False))


def test_a_bad_number_in_held_out_data() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    bad = rows()
    bad[1][0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 1: the reference's output is not finite"):
        fv.verify(model, profile.uniform(4), bad, progress=False)
    with pytest.raises(DataError, match="batch 1: the reference's output is not finite"):
        fv.audit(model, bad, progress=False)
    assert fv.current_map(model) == profile.uniform(8)


class _Unused(nn.Module):
    """Two heads, of which calibration uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(40, 24)
        self.head = nn.Linear(24, 10)
        self.other = nn.Linear(24, 10)
        self.conv = nn.Conv1d(3, 4, 3)
        self.words = nn.Embedding(20, 24)

    def forward(self, x: Tensor, which: str = "head") -> Tensor:
        head: nn.Module = getattr(self, which)
        y: Tensor = head(torch.relu(self.body(x)))
        return y


@pytest.mark.parametrize("objective", [fv.Logits(), fv.Embedding()])
def test_layers_that_are_not_used_are_named_and_still_near_the_original(objective: fv.Objective) -> None:
    model = _Unused()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(64, 40), objective=objective, progress=False)
    assert "calibration never reached other, conv, words: their bits are chosen blindly" in profile.notes
    _sound(profile)
    fv.apply(model, profile.uniform(8))
    x = rows(64, 40, batches=1, seed=4)[0]
    with torch.no_grad():
        for run in (
            lambda m: m(x, "other"),
            lambda m: m.conv(x[:3]),
            lambda m: m.words(torch.arange(20)),
        ):
            got, expected = run(model), run(original)
            assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("objective", [fv.Logits(), fv.Embedding()])
def test_a_channel_that_is_always_zero_in_calibration_still_works_afterwards(objective: fv.Objective) -> None:
    batches = rows(128, 70)
    for batch in batches:
        batch[:, 7] = 0
        batch[:, 32:64] = 0  # a whole group of inputs
    model = mlp()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, batches, objective=objective, group=32, progress=False)
    _sound(profile)
    fv.apply(model, profile.uniform(8, 16))
    assert _error(model, original, batches[0]) < 0.02
    # a channel that wakes up later is not garbage
    assert _error(model, original, rows(64, 70, batches=1, seed=6)[0]) < 0.05
    # and until then it is worth nothing: the first to lose bits
    dead = profile.losses["0:weight"].view(3, 3, -1)[:, 1]
    assert float(dead.abs().max()) < 1e-3 * float(profile.losses["0:weight"].max())


def test_outputs_that_nothing_reads() -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad():
        model[2].weight[:, 16:] = 0
    profile = fv.quantize(model, rows(64, 20), objective=fv.Logits(), progress=False)
    _sound(profile)
    upper, lower = profile.losses["0:weight"].view(2, -1)
    assert float(lower.max()) == 0 < float(upper.max())


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weights_are_within_a_step_of_the_widest_offset(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(value)
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    _sound(profile)
    for level in (2, 3, 4, 6, 8):
        fv.apply(model, profile.uniform(level))
        # an offset is at most 127 eighths of its scale, and feedback may take the next code (4 bits of mantissa)
        error = (model[2].weight.dequantize() - original[2].weight).abs().max()
        assert float(error.detach()) <= abs(value) * 8 / 127 * 1.07


def test_rows_of_zeros_among_others() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3:20] = 0
        model[0].bias[3:20] = 0
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    _sound(profile)
    for level in (2, 4, 8):
        fv.apply(model, profile.uniform(level))
        with torch.no_grad():
            assert torch.equal(model[0](rows()[0])[:, 3:20], torch.zeros(32, 17))
    assert _error(model, original, rows(seed=4)[0]) < 0.03


def test_a_model_of_zeros_has_nothing_to_lose() -> None:
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    _sound(profile)
    assert sum(float(profile.losses[s.name].sum()) for s in profile.weight_sites()) == 0
    with torch.no_grad():
        assert not model(rows()[0]).any()


def test_inputs_that_are_all_zero() -> None:
    model = mlp()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, [torch.zeros(8, 70)], objective=fv.Logits(), progress=False)
    _sound(profile)
    fv.apply(model, profile.uniform(8, 16))
    assert _error(model, original, rows(64, 70, batches=1)[0]) < 0.03


def test_batches_that_end_in_an_error_leave_no_trace() -> None:
    def broken() -> Iterator[Tensor]:
        yield rows()[0]
        raise OSError("the disk is gone")

    model = mlp()
    with pytest.raises(OSError, match="the disk is gone"):
        fv.quantize(model, broken(), progress=False)
    assert not any(m._forward_hooks for m in model.modules())
    fv.quantize(model, rows(), progress=False)


def test_a_convolution_that_saw_one_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    profile = fv.quantize(model, [torch.randn(1, 3, 12, 12)], objective=fv.Logits(), progress=False)
    assert all(bool(table.isfinite().all()) for table in profile.losses.values())


def test_a_model_elsewhere_and_what_is_no_objective() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    with pytest.raises(fv.WeightError, match="is on meta: load the model on the CPU"):
        fv.quantize(copy.deepcopy(model).to("meta"), [torch.randn(2, 8)], progress=False)
    with pytest.raises(fv.DataError, match="is not an Objective"):
        fv.quantize(model, [torch.randn(2, 8)], objective="logits", progress=False)  # type: ignore[arg-type]
    fv.quantize(model, [torch.randn(2, 8)], progress=False)
    with pytest.raises(fv.SiteError, match="4 is not a PrecisionMap"):
        fv.apply(model, 4)  # type: ignore[arg-type]
