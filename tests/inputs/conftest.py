"""A small model that every test of inputs that choose may put at other levels, and leaves as it was."""

from __future__ import annotations

import pytest
from torch import nn

import foveate as fv
from tiny import mlp, rows


@pytest.fixture(scope="module")
def quantized() -> tuple[nn.Module, fv.Profile]:
    model = mlp((96, 64, 48, 10))
    return model, fv.quantize(model, rows(64, 96), objective=fv.Logits(), progress=False)
