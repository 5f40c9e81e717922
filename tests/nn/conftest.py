"""The model that the tests of fused groups share."""

from __future__ import annotations

import pytest
from attention import Attention, X
from torch import nn

import foveate as fv
from foveate.kernels.backends.table import ensure_loaded

ensure_loaded()


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = Attention(bias=request.param)
    fv.quantize(made, [X], progress=False)
    return made.requires_grad_(False)
