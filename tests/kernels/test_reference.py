"""The reference against the formulas of docs/format.md, computed here in float64 from the codes themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.planes import reference
from foveate.kernels.planes.inputs import quantize_input
from tiny import coded, generator, random_levels

GROUPS = (32, 64, 128)
EPS = torch.finfo(torch.float32).eps


@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    group=st.sampled_from(GROUPS),
    reach=st.integers(0, 3),
    row_gains=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpack_is_the_formula(rows: int, columns: int, group: int, reach: int, row_gains: bool, seed: int) -> None:
    w = coded(rows, columns, group=group, reach=reach, row_gains=row_gains, seed=seed)
    levels = random_levels(w.planes, seed)
    w.planes.active_levels[0].copy_(levels)
    got = reference.plane_unpack(w.planes.tensors, w.planes.geometry)
    expected = w.dense(levels)
    # one rounding of scale x unit, one of the sum
    bound = 2 * EPS * (expected.abs() + 16 * float(w.scale.max()) + float(w.offset.abs().max()))
    assert got.dtype == torch.float32
    assert bool(((got.double() - expected).abs() <= bound).all())


def test_a_tile_is_read_no_higher_than_it_is_stored() -> None:
    w = coded(32, 64)
    kept = w.planes.kept(torch.tensor([[3, 0], [8, 2]], dtype=torch.uint8))
    kept.active_levels.fill_(8)
    got = reference.plane_unpack(kept.tensors, kept.geometry)
    expected = w.dense(kept.stored_levels)
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-7)


def _codes(x: Tensor, q_max: float) -> tuple[Tensor, Tensor]:
    top = x.abs().max(1, keepdim=True).values
    return torch.round(x.double() * q_max / top.double()), top.double() / q_max


@pytest.mark.parametrize(("level", "q_max"), [(8, 127.0), (16, 32512.0)])
def test_quantized_inputs(level: int, q_max: float) -> None:
    x = torch.randn(20, 77, generator=generator(3))
    codes, scale = quantize_input(x, level)
    expected, expected_scale = _codes(x, q_max)
    assert float(codes.abs().max()) == q_max
    # a value within rounding error of a tie may go either way
    assert float((codes - expected).abs().max()) <= 1
    assert float((codes != expected).double().mean()) < 1e-2
    assert torch.allclose(scale.double(), expected_scale, rtol=2 * EPS)
    assert float((codes * scale - x).abs().max()) <= float(scale.max()) * (0.5 + q_max * 2 * EPS)


def test_four_bits_have_sixteen_codes_a_block() -> None:
    x = torch.randn(200, 77, generator=generator(3)) * torch.logspace(-3, 2, 200)[:, None]
    x[:, :40] += torch.randn(200, 1, generator=generator(4))
    x[:, 70:] *= 100
    codes, scale = quantize_input(x, 4)
    assert bool((codes == codes.round()).all())
    assert float(codes.abs().max()) <= 15 * 8
    for at in range(0, 77, 32):
        part, q = x[:, at : at + 32], codes[:, at : at + 32]
        span = (part.amax(1, keepdim=True).clamp_min(0) - part.amin(1, keepdim=True).clamp_max(0)).double()
        step = span / 15 + scale.double()  # the next whole number of units
        assert bool((q.amax(1) * scale[:, 0] - q.amin(1) * scale[:, 0] <= 15 * step[:, 0] * (1 + 10 * EPS)).all())
        assert all(len(row.unique()) <= 16 for row in q)
        # half a step for rounding, and half a step more at an end that the zero point's own rounding moved
        assert bool(((q * scale - part).abs() <= step * (1 + 100 * EPS)).all())
        inner = (q > q.amin(1, keepdim=True)) & (q < q.amax(1, keepdim=True))
        assert bool(((q * scale - part).abs() <= step * (0.5 + 100 * EPS))[inner].all())


def test_rows_above_zero_use_all_sixteen_codes() -> None:
    x = torch.rand(50, 300, generator=generator(4))
    codes, scale = quantize_input(x, 4)
    assert codes.amin() == 0
    assert torch.allclose(codes.amax(1, keepdim=True) * scale, x.amax(1, keepdim=True))


def test_an_outlier_is_its_blocks_own_affair() -> None:
    x = torch.randn(20, 128, generator=generator(5))
    x[:, 3] = 50.0
    codes, scale = quantize_input(x, 4)
    error = codes * scale - x
    assert float(error[:, 32:].abs().max()) < 0.5 * 50 / 15 / 8 * 1.6  # one or two units of eight
    assert float(error[:, :32].abs().max()) > 0.5 * 50 / 15 * 0.8


@pytest.mark.parametrize(("level", "steps"), [(4, 15), (8, 127)])
def test_a_range_is_every_rows_scale_and_cuts_off_what_is_beyond(level: int, steps: int) -> None:
    x = torch.tensor([[0.1, 0.5, 2.0, 9.0], [0.0, 0.0, 0.01, -9.0]])
    codes, scale = quantize_input(x, level, torch.tensor([0.0, 3.0]))
    assert torch.allclose(scale, torch.full((2, 1), 3 / steps))
    assert codes[0].tolist() == [round(v * steps / 3) for v in (0.1, 0.5, 2.0)] + [steps]
    assert float(codes[1, 3]) == (0 if level == 4 else -127)
    nan = torch.tensor([0.0, torch.nan])
    assert torch.equal(quantize_input(x, level, nan)[0], quantize_input(x, level)[0])


def test_sixteen_bits_keep_their_own_scale() -> None:
    x = torch.randn(5, 7)
    limits = torch.tensor([-0.1, 0.1])
    assert torch.equal(quantize_input(x, 16, limits)[0], quantize_input(x, 16)[0])


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0.0), (1.5, 2.0), (2.5, 2.0), (-0.5, 0.0), (-1.5, -2.0)])
def test_halves_round_to_even(value: float, expected: float) -> None:
    codes, _ = quantize_input(torch.tensor([[127.0, value]]), 8)
    assert float(codes[0, 1]) == expected


@pytest.mark.parametrize("level", [4, 8, 16, 32])
def test_linear_is_codes_times_weight(level: int) -> None:
    w = coded(37, 150, group=64, row_gains=True, seed=5)
    levels = random_levels(w.planes, 5)
    w.planes.active_levels.copy_(levels[None])
    x = torch.randn(9, 150, generator=generator(4))
    bias = torch.randn(37, generator=generator(5))
    input_level = torch.full((2,), level, dtype=torch.uint8)
    (y,) = reference.plane_linear(x, w.planes.tensors, [bias], w.planes.geometry, input_level)
    seen = x.double()
    if level != 32:
        codes, scale = quantize_input(x, level)
        seen = codes * scale.double()
    expected = seen @ w.dense(levels).t() + bias
    # each product is at most |x| (|m| + 8 |s|); a few roundings for each of the three groups
    size = seen.abs() @ (w.dense(levels).abs().t() + 8 * float(w.scale.max()))
    assert bool(((y.double() - expected).abs() <= 20 * EPS * (size + bias.abs())).all())
