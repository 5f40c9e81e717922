"""Rows that stand for others: which are taken, and that together they count as all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.collect import inputs, statistics
from foveate.collect.collector import Collector
from foveate.collect.input_rows import InputRows, add_product, symmetric
from foveate.collect.kinds import find_weights
from foveate.collect.objectives import Logits
from foveate.collect.sampling import MOST_SKIPPED, RowSampler
from tiny import generator, mlp, rows


def _sampler(enough: int) -> RowSampler:
    return RowSampler(torch.zeros(3, dtype=torch.float64), enough)


@given(calls=st.lists(st.integers(1, 100), min_size=1, max_size=40), enough=st.integers(1, 200))
def test_the_rows_taken_count_as_all(calls: list[int], enough: int) -> None:
    sampler, seen = _sampler(enough), 0
    for count in calls:
        taken = sampler.take(count)
        chosen = range(*taken.rows.indices(count))
        assert len(chosen) == taken.count >= 1
        assert taken.weight * taken.count == pytest.approx(count)
        assert taken.rows.step <= MOST_SKIPPED
        seen += count
        if seen < 2 * enough:
            assert taken.count == count
    assert sampler.counts.tolist() == [sum(calls), float(sampler.counts[1]), len(calls)]
    assert float(sampler.counts[1]) >= min(sum(calls), enough)


def test_the_first_row_moves_on() -> None:
    sampler = _sampler(1)
    starts = [sampler.take(64).rows.start for _ in range(16)]
    assert set(starts) == set(range(MOST_SKIPPED))


def _collected(model: nn.Module, batches: list[Tensor]) -> Collector:
    collector = Collector(find_weights(model), Logits())
    model.requires_grad_(False)
    for batch in batches:
        collector.add(model, batch)
    return collector


def test_sampled_statistics_estimate_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = rows(4096, 70, 16)
    whole = _collected(mlp(), batches)
    for name in ("_ROWS_PER_INPUT", "_ROWS_PER_OUTPUT", "_LEAST_ROWS"):
        monkeypatch.setattr(statistics, name, 1)
    monkeypatch.setattr(inputs, "_ENOUGH_ROWS", 128)
    some = _collected(mlp(), batches)
    for name, of_all in whole.by_module.items():
        sampled = some.by_module[name]
        assert float(sampled.tensors["covariance_rows"][1]) < 0.5 * float(of_all.tensors["covariance_rows"][1])
        for a, b in ((of_all.covariance(), sampled.covariance()), (of_all.gradients(), sampled.gradients())):
            assert a is not None
            assert b is not None
            # entries of n rows are off by about the root of their variances' product over n
            bound = 2 * float(a.diagonal(dim1=-2, dim2=-1).sum()) / float(sampled.tensors["gradients_rows"][1]) ** 0.5
            assert float((a - b).norm()) < bound
            assert torch.equal(b, b.mT)
        assert of_all.inputs is not None
        assert sampled.inputs is not None
        left, right = of_all.inputs.losses(whole.samples), sampled.inputs.losses(some.samples)
        assert torch.allclose(left, right, rtol=0.25)
        assert torch.equal(of_all.tensors["energy_K"], sampled.tensors["energy_K"])


@given(count=st.integers(1, 9), columns=st.integers(1, 600))
def test_half_of_a_product_is_the_whole(count: int, columns: int) -> None:
    x = torch.randn(count, columns, generator=generator(columns))
    found = symmetric(add_product(torch.zeros(columns, columns), x, 2.0))
    assert torch.allclose(found, 2 * x.t() @ x, atol=1e-4)
    assert torch.equal(found, found.t())


def test_layers_that_read_one_input_share_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            gate, kept = self.gate(x), x.clone()
            x.mul_(2.0)  # the next layer reads other values of the same tensor
            y: Tensor = self.down(gate * self.up(x) + 0 * self.gate(kept))
            return y

    made: list[InputRows] = []

    class Counted(InputRows):
        def __init__(self, x: Tensor) -> None:
            super().__init__(x)
            made.append(self)

    monkeypatch.setattr("foveate.collect.collector.InputRows", Counted)
    x = torch.randn(5, 6, generator=generator(1))
    collector = _collected(Gated(), [x])
    assert len(made) == 4
    low = torch.tanh(x)
    for name, expected in (("gate", 2 * low.square().sum(0)), ("up", 4 * low.square().sum(0))):
        assert torch.allclose(collector.by_module[name].tensors["energy_K"].float(), expected, rtol=1e-5)
    made.clear()

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.q(x) + self.k(x)
            return y

    collector = _collected(Same(), [x])
    assert len(made) == 1
    covariances = [collector.by_module[name].covariance() for name in ("q", "k")]
    assert covariances[0] is not None
    assert covariances[1] is not None
    assert torch.equal(covariances[0], covariances[1])
    assert torch.allclose(covariances[0], x.t() @ x / 5, atol=1e-6)
