"""The reference against the formulas of docs/format.md, computed here in float64 from the codes themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels import reference
from tiny import coded, generator, random_levels

GROUPS = (32, 64, 128)
EPS = torch.finfo(torch.float32).eps


@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    group=st.sampled_from(GROUPS),
    reach=st.integers(0, 2),
    row_gains=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpack_is_the_formula(rows: int, columns: int, group: int, reach: int, row_gains: bool, seed: int) -> None:
    w = coded(rows, columns, group=group, reach=reach, row_gains=row_gains, seed=seed)
    levels = random_levels(w.planes, seed)
    w.planes.tags[0].copy_(levels)
    got = reference.plane_unpack(w.planes.tensors, w.planes.form)
    expected = w.dense(levels)
    # one rounding of scale x unit, one of the sum
    bound = 2 * EPS * (expected.abs() + 16 * float(w.scale.max()) + float(w.offset.abs().max()))
    assert got.dtype == torch.float32
    assert bool(((got.double() - expected).abs() <= bound).all())


def test_a_tile_is_read_no_higher_than_it_is_stored() -> None:
    w = coded(32, 64)
    kept = w.planes.kept(torch.tensor([[3, 0], [8, 2]], dtype=torch.uint8))
    kept.tags.fill_(8)
    got = reference.plane_unpack(kept.tensors, kept.form)
    expected = w.dense(kept.resident)
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-7)


def _codes(x: Tensor, q_max: float) -> tuple[Tensor, Tensor]:
    top = x.abs().max(1, keepdim=True).values
    return torch.round(x.double() * q_max / top.double()), top.double() / q_max


@pytest.mark.parametrize(("level", "q_max"), [(4, 7.0), (8, 127.0), (16, 32512.0)])
def test_quantized_inputs(level: int, q_max: float) -> None:
    x = torch.randn(20, 77, generator=generator(3))
    codes, scale = reference.quantize_input(x, level)
    expected, expected_scale = _codes(x, q_max)
    assert float(codes.abs().max()) == q_max
    # a value within rounding error of a tie may go either way
    assert float((codes - expected).abs().max()) <= 1
    assert float((codes != expected).double().mean()) < 1e-2
    assert torch.allclose(scale.double(), expected_scale, rtol=2 * EPS)
    assert float((codes * scale - x).abs().max()) <= float(scale.max()) * (0.5 + q_max * 2 * EPS)


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0.0), (1.5, 2.0), (2.5, 2.0), (-0.5, 0.0), (-1.5, -2.0)])
def test_halves_round_to_even(value: float, expected: float) -> None:
    codes, _ = reference.quantize_input(torch.tensor([[127.0, value]]), 8)
    assert float(codes[0, 1]) == expected


@pytest.mark.parametrize("level", [4, 8, 16, 32])
def test_linear_is_codes_times_weight(level: int) -> None:
    w = coded(37, 150, group=64, row_gains=True, seed=5)
    levels = random_levels(w.planes, 5)
    w.planes.tags.copy_(levels.expand(2, -1, -1))
    x = torch.randn(9, 150, generator=generator(4))
    bias = torch.randn(37, generator=generator(5))
    input_level = torch.full((2,), level, dtype=torch.uint8)
    (y,) = reference.plane_linear(x, w.planes.tensors, [bias], w.planes.form, input_level)
    seen = x.double()
    if level != 32:
        codes, scale = reference.quantize_input(x, level)
        seen = codes * scale.double()
    expected = seen @ w.dense(levels).t() + bias
    # each product is at most |x| (|m| + 8 |s|); a few roundings for each of the three groups
    size = seen.abs() @ (w.dense(levels).abs().t() + 8 * float(w.scale.max()))
    assert bool(((y.double() - expected).abs() <= 20 * EPS * (size + bias.abs())).all())
