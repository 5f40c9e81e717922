"""The model that the tests of fused groups share."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from attention import Attention, X
from torch import nn

import foveate as fv
from foveate.kernels.backends.table import ensure_loaded

ensure_loaded()


@cache
def _quantized(bias: bool) -> nn.Module:
    made = Attention(bias=bias)
    fv.quantize(made, [X], progress=False)
    return made.requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A copy of the test's own."""
    return copy.deepcopy(_quantized(request.param))
