"""Scales and offsets of a byte each, against docs/format.md worked out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.formats.grids import EXPONENTS, decoded, decoded_scale, encoded, exponent_for, least_scale, snapped
from tiny import generator


@pytest.mark.parametrize("exponent", [-64, -7, 0, 32])
def test_every_code_is_the_number_of_the_format(exponent: int) -> None:
    for code in range(256):
        high, low = divmod(code, 16)
        value = 2.0 ** (high - 15) * (1 + low / 16) if high else 2.0**-14 * low / 16
        got = decoded_scale(torch.tensor([code], dtype=torch.uint8), exponent)
        assert float(got) == value * 2.0**exponent


@given(exponent=st.integers(-30, 16), seed=st.integers(0, 2**31))
def test_what_is_on_the_grid_is_kept(exponent: int, seed: int) -> None:
    g = generator(seed)
    code = torch.randint(0, 256, (40,), generator=g, dtype=torch.uint8)
    offset = torch.where(code > 0, torch.randint(-128, 128, (40,), generator=g), 0).to(torch.int8)
    values = decoded(code, offset, exponent)
    again = encoded(*values, exponent)
    assert torch.equal(again[0], code)
    assert torch.equal(again[1], offset)
    # an exponent found from the values holds them too
    found = exponent_for(float(values[0].max()))
    assert found <= exponent
    assert all(torch.equal(a, b) for a, b in zip(decoded(*encoded(*values, found), found), values, strict=True))


@given(size=st.floats(1e-6, 1e4), seed=st.integers(0, 2**31))
def test_the_nearest_is_stored(size: float, seed: int) -> None:
    g = generator(seed)
    scale, part = torch.rand(50, generator=g) * size, torch.randn(50, generator=g) * 3
    exponent = exponent_for(float(scale.max()))
    got, offset = decoded(*encoded(scale, part * scale, exponent), exponent)
    # 4 bits of mantissa: half of 1/16, and a little for float16 before it; or half of the least step
    assert bool(((got - scale).abs() <= scale * (1 / 32 + 2**-10) + least_scale(exponent) / 2).all())
    assert bool(((offset - part * scale).abs() <= got / 16 * (1 + 2**-20))[got > 0.1 * size].all())


@given(shift=st.floats(-40, 40), seed=st.integers(0, 2**31))
def test_an_offset_is_always_in_reach_of_its_scale(shift: float, seed: int) -> None:
    g = generator(seed)
    scale, offset = torch.rand(50, generator=g) + 0.01, torch.randn(50, generator=g) + shift
    exponent = exponent_for(float(torch.maximum(scale, offset.abs() / 8).max()))
    got, middle = snapped(scale, offset, exponent)
    assert bool(((middle - offset).abs() <= got / 16 * (1 + 2**-20)).all())
    # never more than a sixteenth above what it takes, nor than the nearest of what was asked for
    assert bool((got <= torch.maximum(scale, offset.abs() * 8 / 127) * (1 + 1 / 16 + 2**-10)).all())
    again = snapped(got, middle, exponent)
    assert torch.equal(again[0], got)
    assert torch.equal(again[1], middle)


def test_zero_stays_zero() -> None:
    got, middle = snapped(torch.zeros(3), torch.zeros(3), 0)
    assert not got.any()
    assert not middle.any()


@pytest.mark.parametrize("largest", [0.0, 1e-30, 2e10])
def test_exponents_stay_in_their_range(largest: float) -> None:
    assert exponent_for(largest) in EXPONENTS
