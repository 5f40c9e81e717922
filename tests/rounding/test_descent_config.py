"""Overfitting of descent: the loss of codes on other inputs, and the configuration for few rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.rounding import Rounded, degrees_of_freedom, descent_config, overfit_factor, round_weight, with_descent
from foveate.rounding.descent import FITTED_REACH, INPUT_DAMPING, LEVEL_WEIGHTS, LEVEL_WEIGHTS_LOOKED_UP
from foveate.rounding.nearest import CLIP_PENALTIES, CLIP_PENALTIES_FOR_DESCENT
from tiny import generator, read_at

LEVELS = (2, 3, 4, 6, 8)


def _drawn(columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The covariance of inputs, and that of so many drawn from them."""
    g = generator(seed)
    mixing = torch.randn(columns, columns, generator=g) * torch.linspace(1, 0.05, columns) ** 2
    truth = mixing.t() @ mixing / columns + 0.01 * torch.eye(columns)
    x = torch.randn(count, columns, generator=g) @ torch.linalg.cholesky(truth).t()
    return truth, x.t() @ x / count


def _form(w: Tensor, rounded: Rounded, level: int, covariance: Tensor) -> float:
    error = read_at(rounded, level) - w
    return float((error @ covariance * error).sum())


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), columns=st.sampled_from((64, 160)), times=st.floats(1.0, 2.0))
def test_few_rows_lose_no_more_than_nearest_codes_at_any_level(seed: int, columns: int, times: float) -> None:
    truth, seen = _drawn(columns, round(times * columns), seed)
    free = degrees_of_freedom(seen, round(times * columns))
    assert free >= 0.3
    config = descent_config(free, 10**6)
    w = torch.randn(96, columns, generator=generator(seed + 1))
    energy = seen.diagonal()
    nearest = round_weight(w, group=64, input_energy_K=energy)
    start = round_weight(w, group=64, input_energy_K=energy, clip_penalties=config.clip_penalties)
    ours = with_descent(w, start, seen, level_weights=config.level_weights, damping=config.damping, reach=config.reach)
    for level in LEVELS:
        assert _form(w, ours, level, truth) <= 1.05 * _form(w, nearest, level, truth), level
    assert _form(w, ours, 4, truth) < _form(w, nearest, 4, truth)


@pytest.mark.parametrize("times", [4, 8, 16])
def test_the_overfit_factor_predicts_the_loss_on_other_inputs(times: int) -> None:
    columns, seen_more = 128, []
    for seed in range(4):
        truth, seen = _drawn(columns, times * columns, seed)
        w = torch.randn(128, columns, generator=generator(seed + 50))
        start = round_weight(w, group=64, input_energy_K=seen.diagonal(), clip_penalties=CLIP_PENALTIES_FOR_DESCENT)
        # 8 bits alone: codes fine enough to reach the minimum of the form
        ours = with_descent(w, start, seen, level_weights={8: 1.0})
        free = degrees_of_freedom(seen, times * columns)
        seen_more.append(_form(w, ours, 8, truth) / _form(w, ours, 8, seen) / overfit_factor(free))
    assert sum(seen_more) / 4 == pytest.approx(1.0, abs=0.1)


def test_many_rows_are_trusted_and_few_are_not() -> None:
    many, few = descent_config(0.0, 1000), descent_config(0.5, 1000)
    assert many.level_weights == pytest.approx(dict(LEVEL_WEIGHTS))
    assert (many.clip_penalties, many.damping) == (
        pytest.approx(CLIP_PENALTIES_FOR_DESCENT),
        pytest.approx(INPUT_DAMPING),
    )
    assert few.level_weights == pytest.approx(dict(LEVEL_WEIGHTS_LOOKED_UP))
    assert few.clip_penalties == pytest.approx(CLIP_PENALTIES)
    assert few.damping > many.damping
    assert (few.reach, many.reach) == (0, FITTED_REACH)
    eights = [descent_config(free / 100, 1000).level_weights[8] for free in range(51)]
    assert eights == sorted(eights)
    # the same rows of fewer samples are trusted less
    assert (
        descent_config(0.1, 10).level_weights[8]
        > descent_config(0.1, 150).level_weights[8]
        > descent_config(0.1, 10_000).level_weights[8]
    )


def test_degrees_of_freedom_count_directions_that_vary_up_to_a_half() -> None:
    assert degrees_of_freedom(torch.zeros(8, 8), 100) == 0.0
    assert degrees_of_freedom(torch.full((8, 8), torch.nan), 100) == 0.0
    assert degrees_of_freedom(torch.eye(8), 4) == 0.5
    assert degrees_of_freedom(torch.eye(8), 1000) == pytest.approx(8 / (1 + INPUT_DAMPING) / 1000)
    x = torch.randn(500, 2, generator=generator(0)) @ torch.randn(2, 64, generator=generator(1))
    assert degrees_of_freedom(x.t() @ x, 500) == pytest.approx(2 / 500, rel=0.05)
    assert overfit_factor(0.0) == 1.0
    assert overfit_factor(0.5) == 4.0
