"""Error feedback: less error of the layer's output, on the same grids, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.rounding import Rounded, round_weight, with_feedback
from foveate.rounding.feedback import SHARES
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
    fed = with_feedback(w, nearest, covariance)
    before, after = ({k: _output_error(w, r, k, covariance) for k in (2, 3, 4, 6, 8)} for r in (nearest, fed))
    assert after[4] < 0.6 * before[4]
    assert after[3] < before[3]
    assert sum(SHARES[k] * after[k] for k in (2, 3, 4)) < 0.9 * sum(SHARES[k] * before[k] for k in (2, 3, 4))
    # the price: residual planes that cannot reach everything
    assert after[6] < 0.6 * after[4]
    assert after[8] < 0.6 * after[6]
    assert torch.equal(fed.scale, nearest.scale)
    assert torch.equal(fed.offset, nearest.offset)


def test_independent_inputs_only_trade_levels() -> None:
    w = torch.randn(16, 96)
    nearest = round_weight(w, group=32)
    fed = with_feedback(w, nearest, torch.eye(96))

    def cost(rounded: Rounded) -> float:
        # in steps of each group, as codes are chosen; the gains are those of the nearest codes
        step = rounded.scale.float().repeat_interleave(32, 1)
        same = replace(rounded, gain=nearest.gain)
        return sum(SHARES[k] * float((((read_at(same, k) - w) / step) ** 2).sum()) for k in (2, 3, 4))

    assert cost(fed) < cost(nearest)
    assert _output_error(w, fed, 4, torch.eye(96)) < 1.3 * _output_error(w, nearest, 4, torch.eye(96))


def test_a_weight_in_chunks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = _inputs(70), torch.randn(50, 70)
    nearest = round_weight(w, group=64)
    whole = with_feedback(w, nearest, x.t() @ x)
    monkeypatch.setattr("foveate.rounding.rows._CHUNK_BYTES", 1)
    parts = with_feedback(w, nearest, x.t() @ x)
    assert float((whole.anchor == parts.anchor).float().mean()) > 0.98


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = _inputs(150), torch.randn(9, 150)
    nearest = round_weight(w, group=64)
    whole = with_feedback(w, nearest, x.t() @ x)
    monkeypatch.setattr("foveate.rounding.feedback._BLOCK", 7)
    parts = with_feedback(w, nearest, x.t() @ x)
    same = (whole.anchor == parts.anchor) & (whole.residual == parts.residual)
    assert float(same.float().mean()) > 0.99  # the order of float32 sums differs, and a code may tip


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_covariance_of_no_use_leaves_nearest(value: float) -> None:
    w = torch.randn(4, 40)
    nearest = round_weight(w, group=32)
    assert with_feedback(w, nearest, torch.full((40, 40), value)) is nearest


def test_groups_without_spread() -> None:
    w = torch.cat([torch.zeros(4, 32), torch.full((4, 32), 0.25)], 1)
    x = _inputs(64)
    fed = with_feedback(w, round_weight(w, group=32), x.t() @ x)
    assert not read_at(fed, 8)[:, :32].any()
    # a step of 4 bits, of a scale that may be a sixteenth of the value
    assert float((read_at(fed, 8) - w).abs().max()) <= 0.25 * 8 / 127 * (1 + 1 / 16)


def _form(error: Tensor, covariance: Tensor, gradients: Tensor) -> float:
    """tr(G dW H dW^T), what an error costs to second order."""
    return float((gradients * (error @ covariance @ error.t())).sum())


@pytest.mark.parametrize(("rows", "columns", "group"), [(96, 128, 64), (150, 70, 32)])
def test_rows_make_up_for_each_other(rows: int, columns: int, group: int) -> None:
    x, g, w = _inputs(columns), _inputs(rows, seed=1), torch.randn(rows, columns)
    covariance, gradients = x.t() @ x / len(x), g.t() @ g / len(g)
    nearest = round_weight(w, group=group, input_energy_K=covariance.diagonal())
    alone, together = with_feedback(w, nearest, covariance), with_feedback(w, nearest, covariance, gradients[None])
    for level, ratio in ((3, 0.9), (4, 0.8), (6, 0.95)):
        cost = _form(read_at(together, level) - w, covariance, gradients)
        assert cost < ratio * _form(read_at(alone, level) - w, covariance, gradients)
    assert torch.equal(together.scale, nearest.scale)
    assert torch.equal(together.offset, nearest.offset)


def test_independent_rows_have_nothing_to_make_up_for() -> None:
    x, w = _inputs(70), torch.randn(40, 70)
    nearest = round_weight(w, group=32)
    alone, together = with_feedback(w, nearest, x.t() @ x), with_feedback(w, nearest, x.t() @ x, torch.eye(40)[None])
    assert float((alone.anchor == together.anchor).float().mean()) > 0.99


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_of_no_use_leave_rows_on_their_own(value: float) -> None:
    x, w = _inputs(40), torch.randn(20, 40)
    nearest = round_weight(w, group=32)
    alone = with_feedback(w, nearest, x.t() @ x)
    together = with_feedback(w, nearest, x.t() @ x, torch.full((1, 20, 20), value))
    assert torch.equal(alone.anchor, together.anchor)
    assert torch.equal(alone.residual, together.residual)


def test_blocks_of_gradients_are_rounded_apart() -> None:
    """Two blocks of 24 rows, the second ragged: each is what it would be as a weight of its own."""
    x, g, w = _inputs(64), _inputs(48, seed=1), torch.randn(40, 64)
    covariance, nearest = x.t() @ x, round_weight(w, group=32)
    blocks = torch.stack([(g.t() @ g)[:24, :24], (g.t() @ g)[24:, 24:]])
    whole = with_feedback(w, nearest, covariance, blocks)
    for part, block in ((slice(0, 24), blocks[:1]), (slice(24, 40), blocks[1:])):
        own = replace(nearest, scale=nearest.scale[part], offset=nearest.offset[part])
        anchor = with_feedback(w[part], own, covariance, block).anchor
        assert float((anchor == whole.anchor[part]).float().mean()) > 0.99
