"""A budget of loss ends with a measured loss within it, and with hardly more bits than that takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import BudgetError
from tiny import mlp, rows

HELD_OUT = rows(400, 96, 8, seed=9)
SIZES = (96, 128, 64, 10)


def _quantized() -> tuple[nn.Module, fv.Profile, nn.Module]:
    """A model with tiles enough for maps of any loss, its profile, and the original."""
    model = mlp(SIZES)
    with torch.no_grad():
        model[4].weight.mul_(20)  # so that its answers are sure, and bits matter
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(300, 96), objective=fv.Logits(), group=32, progress=False)
    return model, profile, original


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("limit", [0.003, 0.03])
def test_the_measured_loss_is_within_the_budget_whatever_was_predicted(scale: float, limit: float) -> None:
    model, profile, reference = _quantized()
    for table in profile.losses.values():
        table.mul_(scale)  # predictions as wrong as those of a model that breaks, or one that is robust
    before = fv.current_map(model)
    found = fv.fit_to_loss(model, fv.Budget(loss=limit), HELD_OUT, reference=reference, progress=False)
    assert fv.current_map(model) == before
    assert found.within
    assert found.limit == limit
    assert found.measured.bound <= limit
    assert "within the limit" in str(found)
    # nor is it wasteful: half of the limit needs more bytes
    half = fv.fit_to_loss(model, fv.Budget(loss=limit / 2), HELD_OUT, reference=reference, progress=False)
    assert half.plan.bytes_resident > found.plan.bytes_resident
    (again, _) = fv.measure(model, [found.plan], HELD_OUT, reference=reference, progress=False)
    assert again == found.measured
    # other data of the same kind
    (other, _) = fv.measure(model, [found.plan], rows(4000, 96, 8, seed=77), reference=reference, progress=False)
    assert other.divergence <= limit


def test_the_bound_is_twice_the_greater_standard_error() -> None:
    model, profile, reference = _quantized()
    plan = profile.uniform(2)
    (whole, _) = fv.measure(model, [plan], HELD_OUT, reference=reference, objective=fv.Logits(), progress=False)
    fv.apply(model, plan)
    with torch.no_grad():
        parts = [fv.Logits().divergence(reference(x), model(x)).double() for x in HELD_OUT]
    means = torch.stack([p.mean() for p in parts])
    assert whole.batch_error == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-4)
    assert whole.bound == pytest.approx(whole.divergence + 2 * max(whole.batch_error, whole.standard_error))
    (one, _) = fv.measure(model, [plan], [torch.cat(HELD_OUT)], reference=reference, progress=False)
    assert math.isnan(one.batch_error)
    assert one.bound == pytest.approx(one.divergence + 2 * one.standard_error)
    (single, _) = fv.measure(model, [plan], [HELD_OUT[0][:1]], reference=reference, progress=False)
    assert single.samples == 1
    assert single.bound == math.inf


def test_verify_says_whether_a_limit_is_kept() -> None:
    model, profile, reference = _quantized()
    plan = profile.uniform(3)
    found = fv.verify(model, plan, HELD_OUT, reference=reference, limit=1e-9, progress=False)
    assert not found.within
    assert "NOT within the limit of 1e-09" in str(found)
    assert fv.verify(model, plan, HELD_OUT, reference=reference, limit=1e9, progress=False).within
    assert fv.verify(model, plan, HELD_OUT, reference=reference, progress=False).within


def test_a_generous_limit_ends_at_the_cheapest_map() -> None:
    model, _, reference = _quantized()
    found = fv.fit_to_loss(model, fv.Budget(loss=1e6), HELD_OUT, reference=reference, progress=False)
    assert {found.plan.mean_level(s) for s in found.plan.weight_sites()} == {2.0}


def test_it_keeps_to_the_constraints() -> None:
    model, profile, reference = _quantized()
    constraints = fv.Constraints(levels=(2, 4, 8), per_tile=False, input_bits=9.0)
    budget = fv.Budget(loss=0.02)
    found = fv.fit_to_loss(model, budget, HELD_OUT, reference=reference, constraints=constraints, progress=False)
    assert found.within
    assert profile.input_bits(found.plan) <= 9.0
    assert all(isinstance(found.plan.levels[s.name], int) for s in found.plan.weight_sites())
    assert {found.plan.levels[s.name] for s in found.plan.weight_sites()} <= {2, 4, 8}


def test_what_no_map_keeps() -> None:
    model, _, reference = _quantized()
    with pytest.raises(BudgetError, match=r"no map loses as little as 1e-12: the best one measures"):
        fv.fit_to_loss(model, fv.Budget(loss=1e-12), HELD_OUT, reference=reference, progress=False)
    with pytest.raises(BudgetError, match="is not a budget of loss"):
        fv.fit_to_loss(model, fv.Budget(bits=4), HELD_OUT, progress=False)
