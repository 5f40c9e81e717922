"""What is computed again instead of being stored gives what was there, and gradients to the stated error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate as fv


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(64, 48)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Convolved(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.in_place = nn.BatchNorm2d(8), in_place

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.norm(self.first(x)), inplace=self.in_place))
        return out


def _gradients(model: nn.Module, x: Tensor, **settings: object) -> tuple[list[Tensor], fv.ActivationStore]:
    model = copy.deepcopy(model)
    with fv.compress_activations(model, smallest=1, **settings) as store:  # type: ignore[arg-type]
        model(x.clone().requires_grad_() * 1).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], store


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The relative error of all gradients together."""
    a, b = torch.cat([g.flatten() for g in wanted]), torch.cat([g.flatten() for g in found])
    return float((a - b).norm() / a.norm())


def _forms(store: fv.ActivationStore) -> dict[str, str]:
    return {row.operation + "@" + row.layer: row.form for row in store.report().rows}


@pytest.mark.parametrize(
    ("model", "x", "derived"),
    [
        (Gate(), torch.randn(40, 48), {"linear@gate", "mul@model", "linear@down"}),
        (Convolved(), torch.randn(4, 3, 12, 12), {"conv2d@second"}),
    ],
)
def test_sixteen_bits_and_recipes_give_nearly_the_exact_gradient(
    model: nn.Module, x: Tensor, derived: set[str]
) -> None:
    exact, _ = _gradients(model, x, levels=32)
    found, store = _gradients(model, x, levels=16)
    assert derived <= {name for name, form in _forms(store).items() if form == "derived"}
    assert _distance(exact, found) < 1e-3
    _, stored = _gradients(model, x, levels=16, recompute=False)
    assert "derived" not in _forms(stored).values()
    assert store.report().bytes_after < stored.report().bytes_after


def test_in_place_functions_are_not_computed_again_over_what_they_need() -> None:
    model, x = Convolved(in_place=True), torch.randn(4, 3, 12, 12)
    exact, _ = _gradients(model, x, levels=32)
    found, store = _gradients(model, x, levels=16)
    assert _forms(store)["conv2d@second"] == "grouped"
    assert _distance(exact, found) < 1e-3


def test_a_parameter_that_changed_is_noticed() -> None:
    norm = nn.LayerNorm(48)
    linear = nn.Linear(48, 48)
    model = nn.Sequential(norm, linear)
    x = torch.randn(40, 48, requires_grad=True)
    with fv.compress_activations(model, levels=8, smallest=1):
        loss = model(x).sum()
        with torch.no_grad():
            norm.bias.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_was_changed_in_place_is_not_taken_from_a_recipe() -> None:
    linear = nn.Linear(48, 48)
    x = torch.randn(40, 48, requires_grad=True)

    def loss() -> Tensor:
        y = F.silu(x * 2)
        y.add_(1.0)
        out: Tensor = linear(y).square().mean()
        return out

    (wanted,) = torch.autograd.grad(loss(), linear.weight)
    with fv.compress_activations(linear, levels=16, smallest=1):
        (found,) = torch.autograd.grad(loss(), linear.weight)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
