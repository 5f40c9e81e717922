"""A model whose planes are cut into small runs, and what it is compared with."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

import foveate as fv
from tiny import mlp, rows

SIZES = (96, 160, 128, 40)
X = rows(8, SIZES[0], 1)[0]


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return mlp(SIZES)


Saved = tuple[Path, nn.Module, fv.Profile]


def expected(model: nn.Module, loaded: nn.Module) -> torch.Tensor:
    """What the model whose planes are all in memory gives at the map that is in force in the other one."""
    fv.apply(model, fv.current_map(loaded))
    with torch.no_grad():
        y: torch.Tensor = model(X)
    return y


def settled(loaded: nn.Module) -> nn.Module:
    """The model after everything that is on its way has arrived, and a call has taken it."""
    deadline = time.monotonic() + 30
    while fv.memory_report(loaded).waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with torch.no_grad():
        loaded(X)
    return loaded
