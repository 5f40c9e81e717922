"""Statistics of a site, and the group sizes that follow, against the measured noise of rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from foveate.activations.measure.statistics import GROUPS, RunningStatistics, Summary
from foveate.errors import BudgetError
from foveate.kernels.backends.table import ensure_loaded

COUNT = 1 << 16


@pytest.fixture(autouse=True)
def _ops() -> None:
    ensure_loaded()


def summary_of(*batches: Tensor, window: int = 8) -> Summary:
    running = RunningStatistics(window)
    for batch in batches:
        running.add(batch)
    return running.summary()


def with_outliers(seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rare = torch.rand(COUNT, generator=generator) < 0.01
    return torch.randn(COUNT, generator=generator) * torch.where(rare, 20.0, 1.0)


VALUES: Mapping[str, Tensor] = {
    "normal": torch.randn(COUNT, generator=torch.Generator().manual_seed(1)),
    "uniform": torch.rand(COUNT, generator=torch.Generator().manual_seed(2)),
    "laplace": torch.randn(COUNT, generator=torch.Generator().manual_seed(3))
    * torch.empty(COUNT).exponential_(generator=torch.Generator().manual_seed(4)).sqrt(),
    "outliers": with_outliers(),
}


def test_moments_are_torchs() -> None:
    x = 3 + 2 * torch.randn(100, 200)
    x[x < 0] = 0
    found = summary_of(x)
    assert (found.batches, found.count, found.not_finite) == (1, 20_000, 0)
    assert found.mean == pytest.approx(float(x.double().mean()))
    assert found.deviation == pytest.approx(float(x.double().std(correction=0)))
    assert (found.least, found.greatest) == (float(x.min()), float(x.max()))
    assert found.zeros == float((x == 0).double().mean()) > 0
    assert found.outliers == 0


def test_a_window_is_one_batch_of_all_its_values() -> None:
    batches = [torch.randn(n) * n / 1000 + n / 500 for n in (1000, 3000, 500, 2000)]
    found, together = summary_of(*batches, window=3), torch.cat(batches[1:]).double()
    assert (found.batches, found.count) == (3, 5500)
    assert found.mean == pytest.approx(float(together.mean()))
    assert found.deviation == pytest.approx(float(together.std(correction=0)))
    assert (found.least, found.greatest) == (float(together.min()), float(together.max()))
    assert found == summary_of(*batches[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outliers_are_counted(dtype: torch.dtype) -> None:
    x = with_outliers().to(dtype)
    wide = x.double()
    expected = float(((wide - wide.mean()).abs() > 6 * wide.std()).double().mean())
    assert expected > 1e-3
    assert summary_of(x).outliers == pytest.approx(expected, rel=0.1)


def test_entropy_is_that_of_256_cells() -> None:
    even = torch.arange(256).repeat(64).float()
    assert summary_of(even).entropy == pytest.approx(8)
    assert summary_of(torch.tensor([0.0, 1.0]).repeat(100)).entropy == pytest.approx(1)
    assert summary_of(torch.full((100,), 3.0)).entropy == 0
    # of a normal distribution: 1/2 log2(2 pi e) + log2(deviation / cell)
    x = VALUES["normal"]
    cell = float(x.max() - x.min()) / 256
    expected = 0.5 * math.log2(2 * math.pi * math.e) + math.log2(float(x.std()) / cell)
    assert summary_of(x).entropy == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("bits", [4, 8])
def test_the_ranges_of_groups_predict_the_noise_of_rounding(values: Tensor, bits: int) -> None:
    found = summary_of(values)
    for group in GROUPS:
        measured = float(torch.ops.foveate.group_variance(values, [bits], group).sum()) / COUNT
        noise = found.group_ranges[GROUPS.index(group)] / (6 * ((1 << bits) - 1) ** 2)
        assert noise == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_the_group_is_nearly_the_best(values: Tensor) -> None:
    """Best: least noise at equal bytes, a bit being worth a factor of 4."""
    costs = {
        group: float(torch.ops.foveate.group_variance(values, [4], group).sum()) * 4 ** (32 / group) for group in GROUPS
    }
    assert costs[summary_of(values).group()] <= 1.05 * min(costs.values())


def test_outliers_ask_for_smaller_groups() -> None:
    even, normal, heavy = (summary_of(v).group() for v in (VALUES["uniform"], VALUES["normal"], with_outliers()))
    assert even > normal > heavy


def test_values_without_spread_and_values_that_are_none() -> None:
    constant = summary_of(torch.full((1000,), 2.5))
    assert (constant.deviation, constant.zeros, constant.group_ranges) == (0, 0, (0.0,) * len(GROUPS))
    assert constant.group() == 256
    nothing = summary_of(torch.full((1000,), torch.nan))
    assert (nothing.count, nothing.not_finite, nothing.mean) == (0, 1000, 0)
    assert nothing.group() == 256
    assert summary_of() == Summary(0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (0.0,) * len(GROUPS))
    # what is not finite does not spoil the rest
    mixed = summary_of(torch.tensor([1.0, torch.inf, 3.0, torch.nan, -torch.inf]), torch.full((5,), torch.nan))
    assert (mixed.batches, mixed.count, mixed.not_finite, mixed.mean) == (2, 2, 8, 2.0)


def test_a_summary_is_plain_json() -> None:
    found = summary_of(VALUES["normal"])
    read = json.loads(json.dumps(found.to_json()))
    assert read["deviation"] == found.deviation
    assert tuple(read["group_ranges"]) == found.group_ranges


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"window \(=0\) must be at least 1"):
        RunningStatistics(0)
