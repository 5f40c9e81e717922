"""A model small enough for every case of safety, its gradients, and the hooks that a store may leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import foveate as fv


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def exact(model: nn.Module) -> Any:
    return fv.compress_activations(model, levels=32, smallest=1)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def equal(wanted: list[Tensor], found: list[Tensor]) -> bool:
    return len(wanted) == len(found) > 0 and all(map(torch.equal, wanted, found))


def hooks(model: nn.Module) -> int:
    of_modules = nn.modules.module
    count = len(of_modules._global_forward_hooks) + len(of_modules._global_forward_pre_hooks)
    return count + sum(len(p._backward_hooks or ()) for p in model.parameters())
