"""Measuring leaves each module in its mode, and parameters and configurations as they were, also when it fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from foveate.collect.evaluation import evaluating, frozen


def _mixed() -> nn.Sequential:
    """A model in training whose middle is not, as one with a frozen part is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    return model


def _modes(*models: nn.Module) -> list[bool]:
    return [module.training for model in models for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_put_back_module_by_module(fails: bool) -> None:
    one, other = _mixed(), nn.Linear(2, 2)
    before = _modes(one, other)
    try:
        with evaluating(one, other, one):
            assert not any(_modes(one, other))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert _modes(one, other) == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_frozen_model_has_no_gradients_and_no_caches(fails: bool) -> None:
    model = _mixed()
    model.config = SimpleNamespace(use_cache=True)
    model[0].config = SimpleNamespace(use_cache=False)
    before = _modes(model), [p.requires_grad for p in model.parameters()]
    try:
        with frozen(model):
            assert not any(_modes(model))
            assert not model(torch.zeros(2, 4)).requires_grad
            assert not model.config.use_cache
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert (_modes(model), [p.requires_grad for p in model.parameters()]) == before
    assert model.config.use_cache
    assert not model[0].config.use_cache


def test_a_model_that_refuses_evaluation_keeps_its_mode() -> None:
    class Stubborn(nn.Linear):
        def eval(self) -> Stubborn:
            raise RuntimeError("no")

    one, stubborn = _mixed(), Stubborn(2, 2)
    before = _modes(one, stubborn)
    with pytest.raises(RuntimeError, match="no"), evaluating(one, stubborn):
        pass
    assert _modes(one, stubborn) == before
