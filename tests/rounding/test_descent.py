"""Descent: less error of the output at every level, on the same grids, and nothing else changed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.kernels.backends.cpu.library import Status
from foveate.rounding import Rounded, round_weight, with_descent
from foveate.rounding.descent import FITTED_REACH, INPUT_DAMPING, LEVEL_WEIGHTS
from foveate.rounding.nearest import CLIP_PENALTIES_FOR_DESCENT
from tiny import read_at


def _inputs(columns: int, seed: int = 0, samples: int = 4096) -> Tensor:
    """Correlated inputs, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(samples, columns, generator=generator) @ (mixing + 0.3 * torch.ones(1, columns))


def _output_error(w: Tensor, rounded: Rounded, level: int, covariance: Tensor) -> float:
    error = read_at(rounded, level) - w
    return float((error @ covariance * error).sum())


@pytest.mark.parametrize(("rows", "columns", "group"), [(96, 128, 64), (67, 200, 128), (40, 300, 32)])
def test_less_error_of_the_output(rows: int, columns: int, group: int) -> None:
    x, w = _inputs(columns), torch.randn(rows, columns)
    covariance = x.t() @ x / len(x)
    nearest = round_weight(w, group=group, input_energy_K=covariance.diagonal())
    better = with_descent(w, nearest, covariance)
    before, after = ({k: _output_error(w, r, k, covariance) for k in (2, 3, 4, 6, 8)} for r in (nearest, better))
    assert after[4] < 0.6 * before[4]
    assert after[3] < 0.8 * before[3]
    assert after[2] < 0.9 * before[2]
    # the price: residuals that cannot reach everything
    assert after[6] < 0.3 * after[4]
    assert after[8] < 0.6 * after[6]
    assert torch.equal(better.scale, nearest.scale)
    assert torch.equal(better.offset, nearest.offset)


def test_residuals_that_reach_further_lose_less_at_eight_bits_and_no_more_up_to_four() -> None:
    x, w = _inputs(192), torch.randn(64, 192)
    covariance = x.t() @ x / len(x)
    nearest = round_weight(w, group=64, input_energy_K=covariance.diagonal(), clip_penalties=CLIP_PENALTIES_FOR_DESCENT)
    within, further = (with_descent(w, nearest, covariance, reach=reach) for reach in (0, FITTED_REACH))
    assert (within.reach, further.reach) == (0, FITTED_REACH)
    ratio = {
        k: _output_error(w, further, k, covariance) / _output_error(w, within, k, covariance) for k in (2, 3, 4, 8)
    }
    assert ratio[8] < 0.85
    assert max(ratio[2], ratio[3], ratio[4]) < 1.1


def _cost(w: Tensor, rounded: Rounded, covariance: Tensor) -> float:
    return sum(LEVEL_WEIGHTS[k] * _output_error(w, rounded, k, covariance) for k in LEVEL_WEIGHTS)


def test_no_sweep_makes_it_worse() -> None:
    x, w = _inputs(100), torch.randn(30, 100)
    covariance = x.t() @ x / len(x)
    damped = covariance + INPUT_DAMPING * covariance.diagonal().mean() * torch.eye(100)
    nearest = round_weight(w, group=64, input_energy_K=covariance.diagonal())
    costs = []
    for sweeps in range(6):
        better = with_descent(w, nearest, covariance, sweeps=sweeps)
        costs.append(_cost(w, replace(better, gain=nearest.gain), damped))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))
    assert costs[5] < 0.7 * costs[0]


def test_independent_inputs_only_trade_levels() -> None:
    w = torch.randn(16, 96)
    nearest = round_weight(w, group=32)
    better = with_descent(w, nearest, torch.eye(96))
    same = replace(better, gain=nearest.gain)
    assert _cost(w, same, torch.eye(96)) < _cost(w, nearest, torch.eye(96))
    assert _output_error(w, better, 4, torch.eye(96)) < 1.3 * _output_error(w, nearest, 4, torch.eye(96))


def test_a_level_that_has_no_share_pays() -> None:
    x, w = _inputs(96), torch.randn(24, 96)
    covariance = x.t() @ x / len(x)
    nearest = round_weight(w, group=32, input_energy_K=covariance.diagonal())
    four = with_descent(w, nearest, covariance, level_weights={4: 1.0})
    every = with_descent(w, nearest, covariance)
    assert _output_error(w, four, 4, covariance) < _output_error(w, every, 4, covariance)
    assert _output_error(w, four, 2, covariance) > _output_error(w, every, 2, covariance)


def test_half_precision_and_strided_weights() -> None:
    x = _inputs(64)
    w = torch.randn(64, 24).t().half()
    nearest = round_weight(w, group=32)
    assert torch.equal(
        with_descent(w, nearest, x.t() @ x).anchor, with_descent(w.float().contiguous(), nearest, x.t() @ x).anchor
    )


def test_a_weight_in_parts_of_rows_is_the_same() -> None:
    x, w = _inputs(70), torch.randn(150, 70)
    nearest = round_weight(w, group=64)
    whole = with_descent(w, nearest, x.t() @ x)
    part = slice(50, 103)  # across the blocks that rows are taken in
    own = replace(nearest, **{n: getattr(nearest, n)[part] for n in ("anchor", "residual", "scale", "offset")})
    codes = with_descent(w[part], own, x.t() @ x)
    assert float((whole.anchor[part] == codes.anchor).float().mean()) > 0.98


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_covariance_of_no_use_leaves_nearest(value: float) -> None:
    w = torch.randn(4, 40)
    nearest = round_weight(w, group=32)
    assert with_descent(w, nearest, torch.full((40, 40), value)) is nearest


def test_groups_without_spread() -> None:
    w = torch.cat([torch.zeros(4, 32), torch.full((4, 32), 0.25)], 1)
    x = _inputs(64)
    better = with_descent(w, round_weight(w, group=32), x.t() @ x)
    assert not read_at(better, 8)[:, :32].any()
    # a step of 4 bits, of a scale that may be a sixteenth of the value
    assert float((read_at(better, 8) - w).abs().max()) <= 0.25 * 8 / 127 * (1 + 1 / 16)


def _form(error: Tensor, covariance: Tensor, gradients: Tensor) -> float:
    """tr(G dW H dW^T), what an error costs to second order."""
    return float((gradients * (error @ covariance @ error.t())).sum())


@pytest.mark.parametrize(("rows", "columns", "group"), [(96, 128, 64), (150, 70, 32)])
def test_rows_make_up_for_each_other(rows: int, columns: int, group: int) -> None:
    x, g, w = _inputs(columns), _inputs(rows, seed=1), torch.randn(rows, columns)
    covariance, gradients = x.t() @ x / len(x), g.t() @ g / len(g)
    nearest = round_weight(w, group=group, input_energy_K=covariance.diagonal())
    alone, together = with_descent(w, nearest, covariance), with_descent(w, nearest, covariance, gradients[None])
    for level, ratio in ((3, 0.9), (4, 0.8), (6, 0.95)):
        cost = _form(read_at(together, level) - w, covariance, gradients)
        assert cost < ratio * _form(read_at(alone, level) - w, covariance, gradients)
    assert torch.equal(together.scale, nearest.scale)
    assert torch.equal(together.offset, nearest.offset)


def test_independent_rows_have_nothing_to_make_up_for() -> None:
    x, w = _inputs(70), torch.randn(40, 70)
    nearest = round_weight(w, group=32)
    alone, together = with_descent(w, nearest, x.t() @ x), with_descent(w, nearest, x.t() @ x, torch.eye(40)[None])
    assert float((alone.anchor == together.anchor).float().mean()) > 0.99


def test_without_kernels_rows_are_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, w = _inputs(40), _inputs(12, seed=1), torch.randn(12, 40)
    nearest = round_weight(w, group=32)
    alone = with_descent(w, nearest, x.t() @ x)
    monkeypatch.setattr("foveate.rounding.descent.ensure_loaded", lambda: Status(None, "", None))
    assert torch.equal(alone.anchor, with_descent(w, nearest, x.t() @ x, (g.t() @ g)[None]).anchor)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_of_no_use_leave_rows_on_their_own(value: float) -> None:
    x, w = _inputs(40), torch.randn(20, 40)
    nearest = round_weight(w, group=32)
    alone = with_descent(w, nearest, x.t() @ x)
    together = with_descent(w, nearest, x.t() @ x, torch.full((1, 20, 20), value))
    assert torch.equal(alone.anchor, together.anchor)
    assert torch.equal(alone.residual, together.residual)


def test_blocks_of_gradients_are_rounded_apart() -> None:
    """Two blocks of 24 rows, the second ragged: each is what it would be as a weight of its own."""
    x, g, w = _inputs(64), _inputs(48, seed=1), torch.randn(40, 64)
    covariance, nearest = x.t() @ x, round_weight(w, group=32)
    blocks = torch.stack([(g.t() @ g)[:24, :24], (g.t() @ g)[24:, 24:]])
    whole = with_descent(w, nearest, covariance, blocks)
    for part, block in ((slice(0, 24), blocks[:1]), (slice(24, 40), blocks[1:])):
        own = replace(nearest, **{n: getattr(nearest, n)[part] for n in ("anchor", "residual", "scale", "offset")})
        anchor = with_descent(w[part], own, covariance, block).anchor
        assert float((anchor == whole.anchor[part]).float().mean()) > 0.99


def test_kernels_are_loaded_without_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("foveate.rounding.descent.ensure_loaded", lambda: loaded.append(1) or Status(None, "", None))
    w = torch.randn(4, 32)
    with_descent(w, round_weight(w, group=32), torch.eye(32))
    assert loaded


def test_the_default_dtype_does_not_matter() -> None:
    w, x = torch.randn(20, 70), _inputs(70)
    covariance, gradients = x.t() @ x / len(x), torch.eye(20)[None]
    nearest = round_weight(w, group=32)
    wanted = with_descent(w, nearest, covariance, gradients)
    torch.set_default_dtype(torch.float64)
    try:
        found = with_descent(w, nearest, covariance, gradients)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.anchor, wanted.anchor)
    assert torch.equal(found.residual, wanted.residual)
