"""One level alone: a yardstick must be at least as good as what it measures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.peers.quality.one_level import round_for_one_level
from foveate.rounding import round_weight, with_descent
from tiny import read_at


@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 256, 64), (67, 200, 128)])
def test_no_worse_than_nested_codes(level: int, rows: int, columns: int, group: int) -> None:
    x = torch.randn(4096, columns) @ (torch.randn(columns, columns) / columns**0.5 + 0.3)
    w, covariance = torch.randn(rows, columns), x.t() @ x / len(x)
    energy = covariance.diagonal()

    def error(dense: Tensor, h: Tensor) -> float:
        return float(((dense - w) @ h * (dense - w)).sum())

    nested = round_weight(w, group=group, input_energy_K=energy)
    nearest = round_for_one_level(w, level, group=group, input_energy_K=energy)
    assert error(nearest, energy.diag()) < error(read_at(nested, level), energy.diag())
    better = round_for_one_level(w, level, group=group, input_energy_K=energy, covariance_KK=covariance)
    assert error(better, covariance) < error(read_at(with_descent(w, nested, covariance), level), covariance)
    assert error(better, covariance) < 0.8 * error(nearest, covariance)


def test_as_many_values_a_group_as_codes() -> None:
    w = torch.randn(5, 70)
    dense = round_for_one_level(w, 3, group=32)
    assert dense.shape == w.shape
    for row in dense:
        for group in row.split(32):
            assert len(group.unique()) <= 8


def test_constant_and_zero_groups_are_exact() -> None:
    w = torch.cat([torch.zeros(3, 32), torch.full((3, 32), 0.5)], 1)
    assert torch.equal(round_for_one_level(w, 4, group=32), w)
