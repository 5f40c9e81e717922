from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.collect.statistics import Factored
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.sensitivity import tile_losses
from tiny import coded, mlp, quantized_mlp, rows


@pytest.mark.parametrize("factored", [False, True])
def test_losses_are_the_sums_of_their_tiles(factored: bool) -> None:
    w = coded(35, 70, group=32).planes
    original = torch.randn(35, 70)
    g, a = torch.rand(35), torch.rand(70)
    other = torch.rand(35, 70)
    fishers: list[Tensor | Factored] = [Factored(g, a) if factored else g[:, None] * a, other]

    def at_level(level: int) -> Tensor:
        w.active_levels.fill_(level)
        return w.dequantize()

    table = tile_losses(original, at_level, fishers, 32)[0]
    assert table.shape == (9, 6)
    for column, level in enumerate(WEIGHT_LEVELS):
        error = original - (at_level(level) if level else 0)
        score = 0.5 * error.square() * (g[:, None] * a + other)
        for tile in range(9):
            strip, group = divmod(tile, 3)
            part = score[strip * 16 : strip * 16 + 16, group * 32 : group * 32 + 32]
            assert float(table[tile, column]) == pytest.approx(float(part.sum()), rel=1e-4)


def test_with_a_covariance_the_tiles_of_a_strip_add_up_to_its_whole_form() -> None:
    w = coded(35, 70, group=32).planes
    original, g, x = torch.randn(35, 70), torch.rand(35), torch.randn(200, 70) @ torch.randn(70, 70)
    h = x.t() @ x / 200

    def at_level(level: int) -> Tensor:
        w.active_levels.fill_(level)
        return w.dequantize()

    whole = tile_losses(original, at_level, [Factored(g, h.diagonal())], 32, [h])[0]
    for column, level in enumerate(WEIGHT_LEVELS):
        error = (original - (at_level(level) if level else 0)).double()
        expected = 0.5 * g.double() * (error @ h.double() * error).sum(1)
        for strip, found in enumerate(whole[:, column].view(3, 3).double().sum(1).tolist()):
            assert found == pytest.approx(float(expected[16 * strip : 16 * strip + 16].sum()), rel=1e-4)


@pytest.mark.parametrize("size", [35, 20])
def test_with_gradients_the_tiles_of_a_block_add_up_to_its_whole_form(size: int) -> None:
    w = coded(35, 70, group=32).planes
    original, x = torch.randn(35, 70), torch.randn(200, 70) @ torch.randn(70, 70)
    g, h = torch.randn(300, 35) @ torch.randn(35, 35), x.t() @ x / 200
    full = g.t() @ g / 300
    blocks = [slice(at, at + size) for at in range(0, 35, size)]
    kept = torch.zeros(len(blocks), size, size)
    for block, part in zip(kept, blocks, strict=True):
        inside = full[part, part]
        block[: len(inside), : len(inside)] = inside

    def at_level(level: int) -> Tensor:
        w.active_levels.fill_(level)
        return w.dequantize()

    table = tile_losses(original, at_level, [Factored(full.diagonal(), h.diagonal())], 32, [h], [kept])[0]
    for column, level in enumerate(WEIGHT_LEVELS):
        error = (original - (at_level(level) if level else 0)).double()
        form = full.double() * (error @ h.double() @ error.t())
        expected = 0.5 * sum(float(form[part, part].sum()) for part in blocks)
        assert float(table[:, column].double().sum()) == pytest.approx(expected, rel=1e-4)


def test_errors_that_cancel_count_less_where_f_has_no_factors_too() -> None:
    error, h = torch.randn(16, 64), torch.ones(64, 64) + torch.eye(64)
    error -= error.mean(1, keepdim=True)  # all inputs move together, and so the errors cancel
    table = [
        tile_losses(torch.zeros(16, 64), lambda level: -error, [torch.ones(16, 64)], 32, covariances)[0]
        for covariances in ((), [h])
    ]
    column = WEIGHT_LEVELS.index(4)
    assert torch.allclose(table[1][:, column], table[0][:, column] / 2, rtol=1e-3)


def test_predicted_loss_is_the_measured_kl() -> None:
    """A quadratic prediction of small changes: right within a factor at the level where they are small."""
    torch.manual_seed(0)
    original, held_out = mlp(), rows(2000, 70, 4, seed=7)
    model = mlp()
    profile = fv.quantize(model, rows(2000, 70, 4), objective=fv.Logits(), progress=False)
    plans = [profile.uniform(level, 32) for level in (3, 4, 6)]
    outcomes = fv.measure(model, plans, held_out, reference=original, objective=fv.Logits(), progress=False)
    assert outcomes[-1].divergence == 0  # the original's own
    for plan, outcome in zip(plans, outcomes[:-1], strict=True):
        assert 0.7 < outcome.divergence / plan.predicted_loss < 1.4, plan.mean_level(plan.sites[0])


def test_losses_fall_with_the_level() -> None:
    _, profile = quantized_mlp()
    for table in profile.losses.values():
        total = table.sum(0)
        assert bool((total[1:] < total[:-1]).all())
        assert bool((table >= 0).all())


def test_what_cancels_by_chance_costs_no_more_elsewhere_than_if_errors_were_unrelated() -> None:
    generator = torch.Generator().manual_seed(0)
    error, x = torch.randn(16, 64, generator=generator), torch.randn(80, 64, generator=generator)
    h = x.t() @ x / len(x)
    error = error @ torch.linalg.inv(h + 0.05 * torch.eye(64))  # small on what was seen
    use = Factored(torch.ones(16), h.diagonal())
    column = WEIGHT_LEVELS.index(4)

    def losses(overfit: float, covariance: Tensor | None) -> tuple[float, float]:
        table, seen = tile_losses(torch.zeros(16, 64), lambda level: -error, [use], 32, [covariance], overfit=overfit)
        return float(table[:, column].sum()), float(seen[column])

    apart, alike = losses(4.0, None)
    assert apart == pytest.approx(alike, rel=1e-5)  # nothing was fitted
    here, seen = losses(1.0, h)
    assert here == pytest.approx(seen, rel=1e-5)
    assert apart > 4 * here
    assert losses(1.5, h) == pytest.approx((1.5 * here, here), rel=1e-5)
    assert losses(100.0, h) == pytest.approx((apart, here), rel=1e-5)
