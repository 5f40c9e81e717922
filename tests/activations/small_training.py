"""A model small enough for every case of safety, its gradients, and the hooks that a store may leave behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import foveate as fv


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def exact(model: nn.Module) -> Any:
    return fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1))


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


def relative_error(wanted: list[Tensor], found: list[Tensor], relative_to: fv.Relative) -> float:
    """The error of a gradient as the documentation defines it, in plain loops."""
    squares = [float((w.double() - f.double()).square().sum()) for w, f in zip(wanted, found, strict=True)]
    energies = [float(w.double().square().sum()) for w in wanted]
    if relative_to is fv.Relative.WHOLE_GRADIENT:
        return float((sum(squares) / sum(energies)) ** 0.5)
    # half of all values are in tensors whose mean square is no more than this
    in_order = sorted((e / w.numel(), w.numel()) for e, w in zip(energies, wanted, strict=True) if e > 0)
    half, so_far, middle = sum(count for _, count in in_order) / 2, 0, 0.0
    for square, count in in_order:
        if so_far < half:
            middle, so_far = square, so_far + count
    total = sum(w.numel() for w in wanted)
    error = 0.0
    for square, energy, w in zip(squares, energies, wanted, strict=True):
        error += w.numel() / total * square / max(energy, w.numel() * middle * 0.01**2)
    return float(error**0.5)


def errors(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The greatest error of a gradient relative to its size; NaN where one is not finite."""
    apart = [(w - f).norm() / w.norm() for w, f in zip(wanted, found, strict=True)]
    return float(torch.stack(apart).max())


def most_error(settings: Mapping[str, Any]) -> float:
    """What a store may do to a gradient: nothing, what a step of a 15th of the range does, or the error asked for."""
    return {32: 0.0, 4: 0.5, None: settings.get("error", 0.0)}[settings.get("levels")]
