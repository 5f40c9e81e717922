from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import foveate as fv
from foveate.errors import DataError, SiteError
from tiny import mlp, quantized_llama, quantized_mlp, rows, tokens

HELD_OUT = rows(50, 70, 4, seed=9)


def test_outcomes_are_the_means_over_all_samples() -> None:
    model, profile = quantized_mlp()
    original = mlp()
    plan = profile.uniform(3)
    outcomes = fv.measure(
        model, [plan, profile.uniform(8)], HELD_OUT, reference=original, objective=fv.Logits(),
        metric=lambda y, batch: y.argmax(-1).float(), progress=False,
    )  # fmt: skip
    fv.apply(model, plan)
    with torch.no_grad():
        x = torch.cat(HELD_OUT)
        p, q = original(x).log_softmax(-1), model(x).log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    first = outcomes[0]
    assert first.divergence == pytest.approx(float(kl.mean()), rel=1e-4)
    assert first.standard_error == pytest.approx(float(kl.std(correction=0)) / 50**0.5, rel=1e-3)
    assert first.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert first.metric == pytest.approx(float(q.argmax(-1).float().mean()))
    assert first.samples == 50
    assert outcomes[1].divergence < first.divergence
    # last the reference itself
    assert len(outcomes) == 3
    assert (outcomes[2].divergence, outcomes[2].agreement) == (0.0, 1.0)
    assert outcomes[2].metric == pytest.approx(float(p.argmax(-1).float().mean()))


def test_maps_are_compared_on_the_same_batches() -> None:
    model, profile = quantized_mlp()
    plan = profile.uniform(4)
    same = fv.measure(model, [plan, plan], HELD_OUT, objective=fv.Logits(), progress=False)
    assert same[0] == same[1]
    once = fv.measure(model, [plan], (b for b in HELD_OUT), objective=fv.Logits(), progress=False)
    assert once[0] == same[0]


def test_without_a_reference_the_model_is_its_own_with_every_plane() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, profile.uniform(2))
    (top, _) = fv.measure(model, [profile.uniform(8)], HELD_OUT, objective=fv.Logits(), progress=False)
    assert top.divergence == 0.0
    found = fv.verify(model, profile.uniform(3), HELD_OUT, progress=False)
    assert found.reference == "this model with every plane it has"
    assert found.measured.divergence > 0


def test_verify_beside_uniform() -> None:
    model, profile = quantized_mlp()
    plan = fv.allocate(profile, fv.Budget(bits=9))
    found = fv.verify(model, plan, HELD_OUT, reference=mlp(), objective=fv.Logits(), progress=False)
    assert found.predicted == plan.predicted_loss
    assert found.uniform_plan == fv.uniform_of_bytes(plan)
    assert found.holds == (found.measured.divergence <= found.uniform.divergence)
    assert found.best is (plan if found.holds else found.uniform_plan)
    assert "uniform at equal bytes" in str(found)
    assert "the original model" in str(found)


class _Sudden(Exception):
    pass


def _failing() -> Iterator[Tensor]:
    yield HELD_OUT[0]
    raise _Sudden


def test_two_divergences_at_the_floor_are_equal_and_have_no_ratio() -> None:
    model, profile = quantized_mlp()
    found = fv.verify(model, profile.uniform(8), HELD_OUT, progress=False)
    noise = {"samples": 50, "standard_error": 1e-9, "agreement": 1.0, "metric": None}
    at_floor = replace(
        found,
        plan=replace(found.plan, predicted_loss=1e-9),
        measured=fv.Outcome(divergence=3e-9, **noise),
        uniform=fv.Outcome(divergence=-1e-9, **noise),
    )
    assert math.isnan(at_floor.ratio)
    assert at_floor.holds
    assert at_floor.best is at_floor.plan
    assert "(both at the floor of float32)" in str(at_floor)
    above = replace(at_floor, measured=fv.Outcome(divergence=3e-3, **noise))
    assert above.ratio == pytest.approx(3e6)
    assert not above.holds
    assert "floor" not in str(above)


def test_the_map_in_force_and_the_modes_are_put_back() -> None:
    model, profile = quantized_mlp()
    reference = mlp().train()
    high = profile.uniform(8)
    fv.apply(model, high)
    model.train()
    model[0].eval()
    levels = [t.clone() for t in (model[0].weight.active_levels, model[0].input_level)]

    def unchanged() -> bool:
        now = (model[0].weight.active_levels, model[0].input_level)
        modes = (model.training, model[0].training, model[2].training, reference.training)
        return (
            fv.current_map(model) == high and all(map(torch.equal, now, levels)) and modes == (True, False, True, True)
        )

    fv.measure(model, [profile.uniform(2)], HELD_OUT, reference=reference, progress=False)
    assert unchanged()
    with pytest.raises(_Sudden):
        fv.measure(model, [profile.uniform(2)], _failing(), reference=reference, progress=False)
    assert unchanged()
    with pytest.raises(SiteError):
        fv.measure(model, [profile.uniform(2), quantized_llama()[1].uniform(2)], HELD_OUT, progress=False)
    assert unchanged()
    with pytest.raises(RuntimeError):
        fv.verify(model, profile.uniform(2), [torch.randn(2, 71)], reference=reference, progress=False)
    assert unchanged()


def test_no_data_and_bad_data() -> None:
    model, profile = quantized_mlp()
    with pytest.raises(DataError, match="there are no batches to measure on"):
        fv.verify(model, profile.uniform(2), [], progress=False)
    with pytest.raises(SiteError, match="4 is not a PrecisionMap"):
        fv.verify(model, 4, HELD_OUT, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch 1: the reference's output is not finite"):
        fv.verify(model, profile.uniform(2), [HELD_OUT[0], HELD_OUT[1] * math.nan], progress=False)


def test_no_gradients_are_kept() -> None:
    model, profile = quantized_mlp()
    seen = []
    fv.measure(
        model,
        [profile.uniform(2)],
        HELD_OUT,
        metric=lambda y, b: seen.append(y.requires_grad) or y.sum(-1),
        progress=False,
    )  # type: ignore[func-returns-value]
    assert not any(seen)


def test_a_language_model_with_padding() -> None:
    model, profile = quantized_llama()
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in tokens(seed=3)]
    batches[0]["attention_mask"][0, 6:] = 0
    (outcome, _) = fv.measure(model, [profile.uniform(4)], copy.deepcopy(batches), progress=False)
    assert outcome.samples == 48 - 6


def test_the_model_is_no_reference_for_itself() -> None:
    model, profile = quantized_mlp()
    with pytest.raises(DataError, match=r"keep a copy\.deepcopy of the original"):
        fv.verify(model, profile.uniform(3), [rows(4)], reference=model, progress=False)
