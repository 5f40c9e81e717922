"""Error feedback: less error of the layer's output, on the same grids, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.planes import from_codes
from foveate.rounding import Rounded, round_weight, with_feedback


def _inputs(columns: int, seed: int = 0, samples: int = 4096) -> Tensor:
    """Correlated inputs, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(samples, columns, generator=generator) @ (mixing + 0.3 * torch.ones(1, columns))


def _read(rounded: Rounded, level: int) -> Tensor:
    w = from_codes(
        rounded.anchor,
        rounded.residual,
        rounded.scale,
        rounded.offset,
        rounded.gain,
        group=rounded.group,
        reach=rounded.reach,
    )
    w.tags.fill_(level)
    return w.dequantize()


@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 128, 64), (7, 200, 128), (40, 300, 32), (3, 20, 32)])
def test_less_error_of_the_output_at_8_bits(rows: int, columns: int, group: int) -> None:
    x, w = _inputs(columns), torch.randn(rows, columns)
    covariance = x.t() @ x / len(x)
    nearest = round_weight(w, group=group, input_energy_K=covariance.diagonal())
    fed = with_feedback(w, nearest, covariance)

    def output_error(rounded: Rounded, level: int) -> float:
        return float(((_read(rounded, level) - w) @ covariance * (_read(rounded, level) - w)).sum())

    assert output_error(fed, 8) < 0.8 * output_error(nearest, 8)
    # prefixes move by sixteenths of a 4-bit step at most here and there
    assert output_error(fed, 4) < 1.1 * output_error(nearest, 4)
    assert torch.equal(fed.scale, nearest.scale)
    assert torch.equal(fed.offset, nearest.offset)


def test_independent_inputs_leave_nearest_codes() -> None:
    w = torch.randn(16, 96)
    nearest = round_weight(w, group=32)
    fed = with_feedback(w, nearest, torch.eye(96))
    difference = (_read(fed, 8) - _read(nearest, 8)).abs()
    # ties apart, no column has anything to tell another
    step = nearest.scale.float().repeat_interleave(32, 1) / 16
    assert bool((difference <= step * 1.001).all())
    assert float((difference > 0).float().mean()) < 0.05


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
    w = torch.full((4, 64), 0.25)
    x = _inputs(64)
    fed = with_feedback(w, round_weight(w, group=32), x.t() @ x)
    assert torch.equal(_read(fed, 8), w)
