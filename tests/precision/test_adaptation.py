"""The estimator of adaptations: which strips are drawn, and that what they estimate is right on average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.precision.adaptation import Estimator, drawn, slope
from foveate.precision.maps import PrecisionMap, Site, uniform
from tiny import generator

SITES = (Site("a:weight", "weight", 16 * 12 + 5, 64, 32), Site("a:input", "input", 0, 64))


def _maps() -> tuple[PrecisionMap, PrecisionMap]:
    """Maps of 4 and 3 bits, that differ in every other strip."""
    high = uniform(SITES, 4)
    tiles = bytes(3 if (i // 2) % 2 else 4 for i in range(SITES[0].tiles))
    return replace(high, levels={**high.levels, "a:weight": tiles}), high


SIZES = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 2.5, 40.0]), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 8), st.text(max_size=3))
def test_a_drawn_sample_has_its_size_and_its_probabilities(sizes: list[float], count: int, seed: str) -> None:
    given_sizes = torch.tensor(sizes, dtype=torch.float64)
    chosen, inclusion = drawn(given_sizes, count, seed)
    possible = int((given_sizes > 0).sum())
    assert len(chosen) == min(count, possible)
    assert bool((given_sizes[chosen] > 0).all())
    assert bool(((inclusion > 0) & (inclusion <= 1 + 1e-12)).all())
    if possible <= count:
        assert bool((inclusion == 1).all())


def test_the_probability_of_being_drawn_is_what_is_said() -> None:
    sizes = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 20.0, 4.0], dtype=torch.float64)
    times, said = torch.zeros(7), torch.zeros(7)
    for seed in range(2000):
        chosen, inclusion = drawn(sizes, 3, f"{seed}:1")
        times[chosen] += 1
        said[chosen] = inclusion.float()
    # a share of 2000 draws has a standard deviation of at most 0.0112
    assert torch.allclose(times / 2000, said, atol=5 * 0.0112)
    assert times[0] == 0
    assert times[5] == 2000


def test_estimates_are_right_on_average() -> None:
    low, high = _maps()
    g = generator(0)
    gradients = torch.rand(SITES[0].rows, generator=g)
    losses = {"a:weight": torch.rand(SITES[0].tiles, 6, generator=g).cumsum(1).flip(1)}
    errors = torch.randn(SITES[0].rows, generator=g).square()
    errors = errors * (torch.arange(SITES[0].rows) // 16 % 2)  # where levels are the same there is no error
    true = float(0.5 * (gradients * errors).sum())
    padded = torch.nn.functional.pad(errors, (0, 11)).view(-1, 16)
    found = []
    for seed in range(400):
        estimator = Estimator(gradients={"a:weight": gradients}, losses=losses, strips=3, seed=seed)
        (sample,) = estimator.between(low, high).samples
        assert len(sample.strips) == 3
        assert bool((sample.strips % 2 == 1).all())
        found.append(float((sample.row_weights * padded[sample.strips]).sum()))
    spread = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(sum(found) / len(found) - true) < 4 * float(spread)


def test_a_weight_with_few_strips_that_differ_is_estimated_exactly() -> None:
    low, high = _maps()
    gradients = torch.rand(SITES[0].rows, generator=generator(0))
    estimator = Estimator(gradients={"a:weight": gradients}, strips=9, ratios={"a:weight": 2.0})
    (sample,) = estimator.between(low, high).samples
    assert sample.strips.tolist() == [1, 3, 5, 7, 9, 11]
    assert torch.equal(sample.row_weights[0], gradients[16:32])
    assert estimator.between(low, high).samples[0] is sample  # made once
    assert estimator.between(high, high).samples[0].strips.tolist() == []


def test_the_slope_of_two_maps() -> None:
    low, high = _maps()
    estimator = Estimator(gradients={})
    assert slope(estimator.between(low, high)) == 1.0
    low, high = replace(low, predicted_loss=0.3), replace(high, predicted_loss=0.1)
    between = estimator.between(low, high)
    more = high.tile_bytes(SITES[0]) - low.tile_bytes(SITES[0])
    assert between.costs == pytest.approx({"a:weight": 8 * more / SITES[0].weights})
    assert slope(between) == pytest.approx(0.2 / between.costs["a:weight"])
    assert slope(estimator.between(high, low)) == 1.0
