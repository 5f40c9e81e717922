"""Reference outputs: which batches are kept, and how the measured losses correct a profile."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import foveate as fv
from folders import rewrite
from foveate.calibrate import reference_outputs as module
from foveate.calibrate.reference_outputs import MAX_BATCHES, ReferenceOutputs
from foveate.collect.objectives import Logits
from foveate.errors import CheckpointError
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.nn.registry import registry_of
from foveate.precision.profiles import FITTED
from tiny import generator, llama, mlp, rows, tokens


def _kept(reference_outputs: ReferenceOutputs, batches: list[Tensor], model: nn.Module) -> list[int]:
    kept = []
    for number, batch in enumerate(batches):
        if reference_outputs.wants(number, batch):
            reference_outputs.keep(number, batch, model(batch))
            kept.append(number)
    return kept


@given(count=st.integers(1, 200))
def test_batches_are_evenly_spread_and_no_more_than_asked(count: int) -> None:
    reference_outputs = ReferenceOutputs(Logits(), 1)
    batches = [torch.full((1, 3), float(i)) for i in range(count)]
    _kept(reference_outputs, batches, nn.Identity())
    held = list(reference_outputs._kept)
    steps = {b - a for a, b in itertools.pairwise(held)}
    assert held[0] == 0
    assert len(steps) <= 1
    assert len(held) == len(range(0, count, *steps)) if steps else len(held) == 1
    assert min(count, MAX_BATCHES // 2) <= len(held) <= MAX_BATCHES


def test_large_batches_and_outputs_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 4 * 1000 * MAX_BATCHES)
    reference_outputs = ReferenceOutputs(Logits(), 100)
    _kept(reference_outputs, [torch.randn(100, 1000, generator=generator(i)) for i in range(8)], nn.Identity())
    assert len(reference_outputs._kept) == 1  # one such batch takes more than the limit
    assert reference_outputs.samples == 1
    wide = ReferenceOutputs(Logits(), 100)
    _kept(wide, [torch.randn(100, 1, generator=generator(i)) for i in range(8)], nn.Linear(1, 1000))
    assert (
        sum(kept.outcome_nD.numel() for kept in wide._kept.values() if kept is not None) * 4 <= 4 * 1000 * MAX_BATCHES
    )
    assert len(wide._kept) == 8


def test_the_divergence_is_that_of_the_samples_kept() -> None:
    one, other = mlp(), mlp(seed=1)
    batches = rows(60, batches=5)
    reference_outputs = ReferenceOutputs(Logits(), 12)
    with torch.no_grad():
        assert _kept(reference_outputs, batches, one) == [0, 1, 2, 3, 4]
        p, q = (m(torch.cat(batches)).log_softmax(-1) for m in (one, other))
    assert reference_outputs.samples == 60
    assert reference_outputs.divergence(other) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert reference_outputs.divergence(one) == pytest.approx(0, abs=1e-6)


def test_batches_in_one_buffer_are_kept_as_they_were() -> None:
    data = rows(66, batches=6)

    def one_buffer() -> Iterator[Tensor]:
        buffer = torch.empty_like(data[0])
        for batch in data:
            yield buffer.copy_(batch)

    profiles = [fv.quantize(mlp(), b, objective=fv.Logits(), progress=False) for b in (data, one_buffer())]
    assert profiles[0].measured_over_summed == profiles[1].measured_over_summed


def test_mappings_of_any_kind_take_a_bounded_memory() -> None:
    batch = {"x": torch.zeros(1000, 1000)}
    assert module.reference_bytes(UserDict(batch), 0) == module.reference_bytes(batch, 0)
    reference_outputs = ReferenceOutputs(Logits(), 3)
    for number in range(20):
        if reference_outputs.wants(number, UserDict(batch)):
            reference_outputs.keep(number, UserDict(batch), torch.randn(3, 4))
    assert len(reference_outputs._kept) <= module._MAX_BYTES // 4_000_000


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_loss_of_ones_own_is_not_compared_with_a_divergence(scale: float) -> None:
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return scale * output.log_softmax(-1).square().sum()

    profile = fv.quantize(mlp(), rows(256), objective=fv.Logits(), loss=loss, progress=False)
    assert profile.measured_over_summed == (1.0,) * 6
    assert profile.notes[-1].endswith("the loss given is not the divergence that is measured")


def test_an_interruption_leaves_a_model_at_8_bits_with_its_profile() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.left = mlp(), 3

        def forward(self, x: Tensor) -> Tensor:
            self.left -= not isinstance(self.layers[0], nn.Linear)
            if self.left == 0:
                raise KeyboardInterrupt
            result: Tensor = self.layers(x)
            return result

    model = Stopped()
    with pytest.raises(KeyboardInterrupt):
        fv.quantize(model, rows(66), objective=fv.Logits(), progress=False)
    registry = registry_of(model)
    assert registry.profile is not None
    assert registry.profile.measured_over_summed == (1.0,) * 6
    assert registry.plan == registry.profile.uniform(8)
    assert model.training
    assert model(torch.randn(2, 70)).isfinite().all()


def test_predictions_of_uniform_maps_are_what_calibration_measures() -> None:
    model = mlp((70, 64, 32, 10))
    original, batches = copy.deepcopy(model), rows(256)
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    fitted = {n: kept[FITTED].tolist() for n, kept in profile.statistics.items() if FITTED in kept}
    plans = [profile.uniform(level, 16) for level in NESTED_LEVELS]
    found = fv.measure(model, plans, batches, reference=original, objective=fv.Logits(), progress=False)
    assert profile.measured_over_summed[0] == profile.measured_over_summed[1]
    for level, got in zip(NESTED_LEVELS, found, strict=False):
        column = WEIGHT_LEVELS.index(level)
        sums = {s.name: float(profile.losses[s.name][:, column].double().sum()) for s in profile.weight_sites()}
        on_these = sum(loss / fitted[name][column] if name in fitted else loss for name, loss in sums.items())
        ratio = max(1.0, got.divergence / on_these)
        assert profile.measured_over_summed[column] == pytest.approx(ratio, rel=1e-3)
        # on other data it loses more, by as much as codes were fitted
        inputs = profile.predict_inputs(plans[0].levels)
        assert profile.uniform(level, 16).predicted_loss - inputs == pytest.approx(ratio * sum(sums.values()), rel=1e-3)


@given(seed=st.integers(0, 50))
def test_allocated_maps_are_predicted_as_the_profile_predicts_them(seed: int) -> None:
    profile = _PROFILE
    g = generator(seed)
    factors = (1 + 3 * torch.rand(6, generator=g)).tolist()
    changed = dataclasses.replace(profile, measured_over_summed=tuple(factors))
    budget = fv.Budget(bits=3.5 + 4 * float(torch.rand(1, generator=g)))
    plan, plain = fv.allocate(changed, budget), fv.allocate(profile, budget)
    assert plan.predicted_loss == pytest.approx(changed.predict(plan), rel=1e-5)
    # which bits are worth most is not changed by it
    assert plan == plain
    # a budget of loss is one of what is predicted
    least = changed.uniform(8).predicted_loss
    limit = least * (1.01 + 100 * float(torch.rand(1, generator=g)))
    within = fv.allocate(changed, fv.Budget(loss=limit))
    assert within.predicted_loss <= limit * (1 + 1e-6)


_PROFILE = fv.quantize(mlp((70, 64, 48, 10)), rows(256), objective=fv.Logits(), progress=False)


def test_strips_of_fitted_weights_are_read_at_one_level() -> None:
    site = next(s for s in _PROFILE.weight_sites() if s.grid[1] > 1)
    assert FITTED in _PROFILE.statistics[site.name]
    levels = fv.allocate(_PROFILE, fv.Budget(bits=4.9)).levels[site.name]
    cells = bytes([levels]) * site.tiles if isinstance(levels, int) else levels
    groups = site.grid[1]
    assert all(len(set(cells[i : i + groups])) == 1 for i in range(0, site.tiles, groups))
    plain = {n: {k: t for k, t in kept.items() if k != FITTED} for n, kept in _PROFILE.statistics.items()}
    nearest = dataclasses.replace(_PROFILE, statistics=plain)
    budgets = [fv.Budget(bits=b / 10) for b in range(35, 80)]
    found = [fv.allocate(nearest, budget).levels[site.name] for budget in budgets]
    mixed = [f for f in found if isinstance(f, bytes)]
    assert any(len(set(f[i : i + groups])) > 1 for f in mixed for i in range(0, site.tiles, groups))


def test_one_sample_says_nothing_of_all_together() -> None:
    profile = fv.quantize(mlp(), [torch.randn(1, 70)], objective=fv.Logits(), progress=False)
    assert profile.measured_over_summed == (1.0,) * 6
    assert profile.notes[-1] == "what all weights lose together was not measured: there is no second sample"


def test_a_model_that_breaks_on_planes_is_not_corrected_by_nonsense() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(40, 8)

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            # any change of the weights at all is the end of it
            exact = isinstance(self.layer, nn.Linear)
            return SimpleNamespace(logits=y if exact else y * float("nan"))

    profile = fv.quantize(Fragile(), rows(60, 40), progress=False)
    assert profile.measured_over_summed == (1.0,) * 6
    assert profile.notes[-1].endswith("an output is not finite")


def test_a_folder_keeps_it_and_older_ones_have_none(tmp_path: Path) -> None:
    model = llama()
    profile = fv.quantize(model, tokens(), progress=False)
    assert max(profile.measured_over_summed) > 1
    fv.save(model, tmp_path / "new")
    loaded = fv.load_profile(tmp_path / "new")
    assert loaded.measured_over_summed == profile.measured_over_summed
    plan = profile.uniform(3)
    assert loaded.predict(plan) == pytest.approx(profile.predict(plan))

    def without(data: Any) -> Any:
        return {**data, "profile": {k: v for k, v in data["profile"].items() if k != "measured_over_summed"}}

    rewrite(tmp_path / "new", without)
    assert fv.load_profile(tmp_path / "new").measured_over_summed == (1.0,) * 6


@pytest.mark.parametrize("wrong", [[1.0] * 5, [1.0] * 5 + [0.0], [1.0] * 5 + [-1], [1.0] * 5 + ["1"], 7])
def test_a_folder_that_says_nonsense_of_it_is_refused(wrong: Any, tmp_path: Path) -> None:
    model = mlp()
    fv.quantize(model, rows(), progress=False)
    fv.save(model, tmp_path)
    rewrite(tmp_path, lambda data: {**data, "profile": {**data["profile"], "measured_over_summed": wrong}})
    with pytest.raises(CheckpointError, match="malformed"):
        fv.load_profile(tmp_path)
