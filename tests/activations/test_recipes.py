"""Tensors that are computed again equal the saved ones, and gradients are within the stated error."""

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


def _gradients(
    model: nn.Module, x: Tensor, *, levels: int, recompute: bool = True
) -> tuple[list[Tensor], fv.ActivationStore]:
    model = copy.deepcopy(model)
    options = fv.ActivationOptions(smallest=1, recompute=recompute)
    with fv.compress_activations(model, levels=levels, options=options) as store:
        model(x.clone().requires_grad_() * 1).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], store


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The relative error of all gradients together."""
    a, b = torch.cat([g.flatten() for g in wanted]), torch.cat([g.flatten() for g in found])
    return float((a - b).norm() / a.norm())


def _forms(store: fv.ActivationStore) -> dict[str, str]:
    return {row.operation + "@" + row.layer: row.form for row in store.report().rows}


@pytest.mark.parametrize(
    ("model", "x", "recomputed"),
    [
        (Gate(), torch.randn(40, 48), {"linear@gate", "mul@model", "linear@down"}),
        (Convolved(), torch.randn(4, 3, 12, 12), {"conv2d@second"}),
    ],
)
def test_sixteen_bits_and_recipes_give_nearly_the_exact_gradient(
    model: nn.Module, x: Tensor, recomputed: set[str]
) -> None:
    exact, _ = _gradients(model, x, levels=32)
    found, store = _gradients(model, x, levels=16)
    assert recomputed <= {name for name, form in _forms(store).items() if form == "recomputed"}
    assert _distance(exact, found) < 1e-3
    _, stored = _gradients(model, x, levels=16, recompute=False)
    assert "recomputed" not in _forms(stored).values()
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
    with fv.compress_activations(model, levels=8, options=fv.ActivationOptions(smallest=1)):
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
    with fv.compress_activations(linear, levels=16, options=fv.ActivationOptions(smallest=1)):
        (found,) = torch.autograd.grad(loss(), linear.weight)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("norm", [nn.LayerNorm(64), nn.BatchNorm1d(64)])
def test_norms_with_wider_weights_than_their_input(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Tanh(), norm, nn.Linear(64, 64).bfloat16())
    x = torch.randn(64, 64).bfloat16()
    model(x).float().square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with fv.compress_activations(model, levels=8, options=fv.ActivationOptions(smallest=1)) as store:
        model(x).float().square().mean().backward()
    assert _forms(store)["linear@3"] == "recomputed"
    assert _distance(wanted, [p.grad for p in model.parameters() if p.grad is not None]) < 0.03


def test_torch_batch_norm_has_its_arguments_in_another_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    x, mean, variance = torch.randn(64, 64), 3 * torch.randn(64), 3 + torch.rand(64)

    def run() -> list[Tensor]:
        model.zero_grad()
        h = torch.tanh(model[0](x))
        y = torch.batch_norm(h, model[1].weight, model[1].bias, mean, variance, True, 0.1, 1e-5, False)
        model[2](y).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = run()
    with fv.compress_activations(model, levels=8, options=fv.ActivationOptions(smallest=1)):
        assert _distance(wanted, run()) < 0.02


def test_what_a_recipe_reads_must_not_have_changed() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
    with fv.compress_activations(model, error=1e-9, options=fv.ActivationOptions(default=32)):
        h = model[0](torch.randn(64, 64))
        unused = model[1](h)  # this saves h as it is, and no backward looks whether it still is
        y = model[2](h + model[0].bias)
        with torch.no_grad():
            h.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()
    assert unused.requires_grad
