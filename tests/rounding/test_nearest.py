"""Rounding to nearest codes: bounds that follow from the step, and the properties of the search for grids."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import DataError, FoveateError, WeightError
from foveate.formats.grids import EXPONENTS, exponent_for, least_scale, snapped
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS, code_range, code_step
from foveate.kernels.rounding import grid_search
from foveate.planes import from_codes
from foveate.rounding import Rounded, nearest, round_weight

EPS = torch.finfo(torch.float32).eps
HALF_EPS = torch.finfo(torch.float16).eps


def spread(rounded: Rounded, t_NG: Tensor) -> Tensor:
    """[N, K] of a value a group."""
    return t_NG.double().repeat_interleave(rounded.group, 1)[:, : rounded.anchor.shape[1]]


def code_at(rounded: Rounded, level: int) -> Tensor:
    anchor, residual = rounded.anchor.long(), rounded.residual.long()
    return anchor >> (4 - level) if level <= 4 else (anchor << (level - 4)) + (residual >> (8 - level))


def decoded(rounded: Rounded, level: int, *, gained: bool = True) -> Tensor:
    """docs/format.md, "Values", float64 [N, K]."""
    centred = (code_at(rounded, level) - code_range(level, 0) / 2) * code_step(level, 0)
    gained = gained and level in GAINED_LEVELS
    gain = rounded.gain[GAINED_LEVELS.index(level)].double()[:, None] if gained else 1.0
    return spread(rounded, rounded.offset) + spread(rounded, rounded.scale) * gain * centred


def check_nearest(w_NK: Tensor, rounded: Rounded) -> None:
    """Within half a step at every level, or, beyond the grid, at its end. Float32 arithmetic may err by a few ulp."""
    w_NK = w_NK.double()
    scale, offset = spread(rounded, rounded.scale), spread(rounded, rounded.offset)
    slack = 16 * EPS * (w_NK.abs() + offset.abs() + 8 * scale)
    inside = (w_NK - offset).abs() <= 8 * scale
    for level in NESTED_LEVELS:
        error = (decoded(rounded, level, gained=False) - w_NK).abs()
        assert bool((error <= scale * code_step(level, 0) / 2 + slack)[inside].all())
        code = code_at(rounded, level)
        at_end = torch.where(w_NK > offset, code == code_range(level, 0), code == 0)
        assert bool((at_end | inside | (scale == 0)).all())


def weighted_error(w_NK: Tensor, rounded: Rounded, level: int, energy_K: Tensor | float = 1.0) -> float:
    return float(((decoded(rounded, level) - w_NK).square() * energy_K).sum())


def minmax_error(w_NK: Tensor, bits: int, group: int) -> float:
    """The error of the plain nearest grid of so many bits from the least to the largest weight of each group."""
    w = w_NK.double().view(w_NK.shape[0], -1, group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return float((torch.round((w - low) / step) * step + low - w).square().sum())


def same(a: Rounded, b: Rounded) -> bool:
    names = ("anchor", "residual", "scale", "offset", "gain")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(1, 300), st.just(1024)),
    group=st.sampled_from([32, 64, 128]),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_shape_dtype_and_size(
    rows: int, columns: int, group: int, size: float, shift: float, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    w_NK = ((torch.randn(rows, columns, generator=g) + shift).clamp(-36, 36) * size).clamp(-6e4, 6e4).to(dtype)
    energy_K = torch.rand(columns, generator=g) ** 4 if weighted else None
    rounded = round_weight(w_NK, group=group, input_energy_K=energy_K)
    groups = -(-columns // group)
    assert rounded.anchor.shape == rounded.residual.shape == (rows, columns)
    assert rounded.anchor.dtype == rounded.residual.dtype == torch.uint8
    assert int(rounded.anchor.max()) <= 15
    assert int(rounded.residual.max()) <= 15
    assert rounded.scale.shape == rounded.offset.shape == (rows, groups)
    assert rounded.gain.shape == (2, rows if columns >= 1024 else 1)
    assert rounded.gain.dtype == torch.float16
    stored = snapped(rounded.scale, rounded.offset, exponent_for(float(rounded.scale.max())))
    assert all(torch.equal(a, b) for a, b in zip(stored, (rounded.scale, rounded.offset), strict=True))
    assert all(bool(t.isfinite().all()) for t in (rounded.scale, rounded.offset, rounded.gain))
    assert bool((rounded.scale >= 0).all())
    check_nearest(w_NK, rounded)


@given(bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]), at=st.integers(0, 3 * 70 - 1))
def test_not_finite_is_refused(bad: float, at: int) -> None:
    w_NK = torch.randn(3, 70)
    w_NK.view(-1)[at] = bad
    with pytest.raises(WeightError, match="NaN or Inf"):
        round_weight(w_NK, group=32)


@pytest.mark.parametrize("value", [1e30, -1e30, 65600.0])
def test_beyond_float16_is_refused(value: float) -> None:
    with pytest.raises(WeightError, match="beyond 65504"):
        round_weight(torch.tensor([[0.0, value]]), group=32)


def test_largest_float16_is_held() -> None:
    w_NK = torch.tensor([[65504.0, -65504.0] * 16, [65504.0] * 32])
    rounded = round_weight(w_NK, group=32)
    check_nearest(w_NK, rounded)
    assert float((decoded(rounded, 8) - w_NK).abs().max()) <= 65504 * 2**-7


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(0, 4), torch.zeros(4, 0)],
)
def test_not_a_matrix_of_floats_is_refused(bad: Tensor) -> None:
    with pytest.raises(WeightError, match="is not a matrix"):
        round_weight(bad, group=32)


def test_unknown_group_is_refused() -> None:
    with pytest.raises(FoveateError, match="group"):
        round_weight(torch.zeros(2, 2), group=48)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        ([1.0, 1.0], "shape"),
        ([1.0, -1.0, 1.0], "negative"),
        ([1.0, float("nan"), 1.0], "NaN"),
        ([1.0, float("inf"), 1.0], "Inf"),
    ],
)
def test_bad_energy_is_refused(energy: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        round_weight(torch.zeros(2, 3), group=32, input_energy_K=torch.tensor(energy))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.7, 12345.6, 1e-4, 1e-30])
def test_constant_groups(value: float) -> None:
    w_NK = torch.full((3, 80), value)
    rounded = round_weight(w_NK, group=64)
    # an offset is at most 127 eighths of the scale, so the scale may be a sixteenth of the value; and a step more of it
    for level in NESTED_LEVELS:
        bound = abs(value) * 8 / 127 * (1 + 1 / 16) * code_step(level, 0) / 2 + least_scale(EXPONENTS[0])
        assert float((decoded(rounded, level) - w_NK.double()).abs().max()) <= bound


def test_a_row_of_zeros_among_others_stays_zero() -> None:
    w_NK = torch.randn(3, 96)
    w_NK[1] = 0
    rounded = round_weight(w_NK, group=32)
    for level in NESTED_LEVELS:
        assert not decoded(rounded, level)[1].any()


def test_prefixes_are_nearest_in_their_own_grids() -> None:
    w_NK = torch.randn(8, 256)
    rounded = round_weight(w_NK, group=128)
    for level in NESTED_LEVELS:
        codes = torch.arange(code_range(level, 0) + 1).double()
        offset, scale = spread(rounded, rounded.offset)[..., None], spread(rounded, rounded.scale)[..., None]
        values = offset + scale * code_step(level, 0) * (codes - code_range(level, 0) / 2)
        least = (values - w_NK[..., None]).abs().amin(-1)
        error = (decoded(rounded, level, gained=False) - w_NK).abs()
        assert bool((error <= least + 64 * EPS).all())


def test_planes_read_what_was_rounded() -> None:
    w_NK = torch.randn(20, 100)
    r = round_weight(w_NK, group=64)
    planes = from_codes(r.anchor, r.residual, r.scale, r.offset, r.gain, group=r.group, reach=r.reach)
    for level in NESTED_LEVELS:
        planes.active_levels.fill_(level)
        torch.testing.assert_close(planes.dequantize().double(), decoded(r, level), rtol=0, atol=16 * EPS)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tails", ["normal", "laplace"])
def test_no_worse_than_the_plain_grid(tails: str, group: int) -> None:
    w_NK = torch.randn(64, 512) if tails == "normal" else torch.distributions.Laplace(0.0, 1.0).sample((64, 512))
    rounded = round_weight(w_NK, group=group)
    for level in (3, 4):
        assert weighted_error(w_NK, rounded, level) < minmax_error(w_NK, level, group)
    # One grid for all: 6 and 8 bits give up a little for the levels below, less than half a bit.
    assert weighted_error(w_NK, rounded, 6) < 2 * minmax_error(w_NK, 6, group)
    assert weighted_error(w_NK, rounded, 8) < 0.02 * weighted_error(w_NK, rounded, 4)


def _any(scale_R: Tensor, offset_R: Tensor) -> tuple[Tensor, Tensor]:
    """A form that can hold every grid."""
    return scale_R, offset_R


def test_search_never_costs_more_than_the_whole_range() -> None:
    w_gR, importance_gR = torch.randn(128, 300) ** 3, torch.rand(128, 300)
    cost = partial(grid_search._cost, w_gR, importance_gR, sum(nearest.CLIP_PENALTIES), 0.05 * importance_gR.sum(0))
    scale_R, offset_R = grid_search.search(w_gR, importance_gR, cost, _any, 1e-9)
    low, high = torch.aminmax(w_gR, dim=0)
    whole = ((high - low) / 15, (low + high) / 2)
    cost_R = cost(scale_R, offset_R)
    assert bool((cost_R <= cost(*whole) * 1.01).all())
    assert float(cost_R.sum()) < 0.8 * float(cost(*whole).sum())


def test_cost_is_the_sum_of_errors_in_own_steps() -> None:
    w_gR, importance_gR = torch.randn(32, 5), torch.rand(32, 5)
    scale_R, offset_R = torch.full((5,), 0.25), torch.full((5,), 0.125)
    u = (w_gR - offset_R).double() / 0.25
    want = torch.full((5,), 0.0, dtype=torch.float64)
    for step, half in ((4, 2), (2, 4), (1, 8)):
        centre = (torch.floor(u / step).clamp(-half, half - 1) + 0.5) * step
        want += (importance_gR.double() * ((u - centre) / step).square()).sum(0)
    want += 7.0 * (importance_gR.double() * (u.abs() - 8).clamp_min(0).square()).sum(0)
    got = grid_search._cost(w_gR, importance_gR, 7.0, torch.zeros(5), scale_R, offset_R)
    torch.testing.assert_close(got.double(), want * 0.25**2, rtol=1e-5, atol=0)


def test_importance_lowers_the_weighted_error() -> None:
    w_NK, energy_K = torch.randn(64, 1024), torch.rand(1024) ** 8
    plain = round_weight(w_NK, group=128)
    weighted = round_weight(w_NK, group=128, input_energy_K=energy_K)
    for level in (2, 3, 4):
        assert weighted_error(w_NK, weighted, level, energy_K) < 0.9 * weighted_error(w_NK, plain, level, energy_K)


def test_unit_of_the_energy_does_not_matter() -> None:
    w_NK, energy_K = torch.randn(4, 100), torch.rand(100)
    want = round_weight(w_NK, group=32, input_energy_K=energy_K)
    for unit in (2.0**-100, 2.0**100):
        assert same(round_weight(w_NK, group=32, input_energy_K=energy_K * unit), want)
    alike = round_weight(w_NK, group=32)
    for same_energy in (torch.zeros(100), torch.full((100,), 7.0)):
        assert same(round_weight(w_NK, group=32, input_energy_K=same_energy), alike)


def test_the_default_dtype_does_not_matter() -> None:
    w_NK = torch.randn(4, 100)
    want = round_weight(w_NK, group=32)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(round_weight(w_NK, group=32), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_never_seen_count_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, energy_K = torch.randn(16, 64), torch.ones(64)
    energy_K[::2] = 0
    w_NK[:, ::2] *= 10

    def unseen_error() -> float:
        rounded = round_weight(w_NK, group=64, input_energy_K=energy_K)
        return weighted_error(w_NK, rounded, 8, (energy_K == 0).double())

    error = unseen_error()
    monkeypatch.setattr(nearest, "_LEAST_IMPORTANCE", 0.0)
    assert error < 0.8 * unseen_error()


def test_refit_is_least_squares() -> None:
    code_gR = torch.randint(-8, 8, (64, 10)) + 0.5
    scale_R, offset_R = 0.5 + torch.rand(10), torch.randn(10)
    w_gR, importance_gR = offset_R + scale_R * code_gR, torch.rand(64, 10)
    step_R, middle_R = grid_search._refit(w_gR, importance_gR, scale_R * 1.02, offset_R + 0.03, 8)
    torch.testing.assert_close(step_R, scale_R)
    torch.testing.assert_close(middle_R, offset_R)


def test_gain_restores_the_energy_of_rows() -> None:
    w_NK, energy_K = torch.randn(16, 1030), 0.5 + torch.rand(1030)
    rounded = round_weight(w_NK, group=128, input_energy_K=energy_K)
    offset = spread(rounded, rounded.offset)
    want = (energy_K * (w_NK - offset).square()).sum(1)
    for level in (2, 3):
        got = (energy_K * (decoded(rounded, level) - offset).square()).sum(1)
        # the gain is rounded to float16: half an ulp, twice for its square
        torch.testing.assert_close(got, want, rtol=2 * HALF_EPS, atol=0)


def test_rows_do_not_depend_on_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, energy_K = torch.randn(37, 150), torch.rand(150)
    whole = round_weight(w_NK, group=64, input_energy_K=energy_K)
    assert same(whole, round_weight(w_NK, group=64, input_energy_K=energy_K))
    monkeypatch.setattr(nearest, "_CHUNK", 1000)
    assert same(whole, round_weight(w_NK, group=64, input_energy_K=energy_K))


def test_leaves_its_arguments_and_the_graph_alone() -> None:
    w_NK: Any = torch.nn.Parameter(torch.randn(4, 40))
    energy_K = torch.rand(40)
    before = w_NK.detach().clone(), energy_K.clone()
    rounded = round_weight(w_NK, group=32, input_energy_K=energy_K)
    assert torch.equal(w_NK.detach(), before[0])
    assert torch.equal(energy_K, before[1])
    assert not rounded.scale.requires_grad
    assert round_weight(w_NK.detach().t().contiguous().t(), group=32, input_energy_K=energy_K).anchor.equal(
        rounded.anchor
    )
