"""Exact levels in allocation: only where tiles have exact values, within every budget, and never for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.formats.levels import NESTED_LEVELS
from foveate.precision.profiles import EXACT, FITTED
from tiny import generator


def _profile(seed: int, share: float, fitted: bool) -> fv.Profile:
    g = generator(seed)
    sites, losses, statistics = [], {}, {}
    for number, (rows, columns) in enumerate(((48, 256), (20, 128), (64, 384))):
        site = fv.Site(f"layer{number}:weight", "weight", rows, columns, rows_read=rows)
        table = torch.rand(site.tiles, 1, generator=g) * torch.tensor([60.0, 9.0, 3.0, 1.0, 0.1, 0.01])
        losses[site.name] = table.float()
        exact = torch.where(torch.rand(site.tiles, generator=g) < share, 16 if number else 32, 0)
        statistics[site.name] = {EXACT: exact.float(), **({FITTED: torch.ones(6)} if fitted else {})}
        sites.append(site)
    return fv.Profile(tuple(sites), losses, 1000, 10, "logits", statistics)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from((0.0, 0.05, 0.5, 1.0)),
    fitted=st.booleans(),
    bits=st.floats(2.3, 34.0),
)
def test_budgets_hold_and_exact_levels_are_where_exact_values_are(
    seed: int, share: float, fitted: bool, bits: float
) -> None:
    profile = _profile(seed, share, fitted)
    plan = fv.allocate(profile, fv.Budget(bits=bits))
    nested = fv.allocate(profile, fv.Budget(bits=bits), fv.Constraints(levels=NESTED_LEVELS))
    assert plan.bits <= bits + 1e-6
    # a solver along convex hulls may be off by a step, here and there
    assert plan.predicted_loss <= nested.predicted_loss * 1.02 + 1e-9
    for site in profile.weight_sites():
        levels = plan.levels[site.name]
        tiles = torch.tensor(list(bytes([levels]) * site.tiles if isinstance(levels, int) else levels))
        exact = profile.exact_levels(site.name)
        assert exact is not None
        assert bool(((tiles <= 8) | (tiles == exact)).all())
    resident = plan.bytes_resident
    assert fv.allocate(profile, fv.Budget(bytes=resident)).bytes_resident <= resident
    if bits > 33 and (share in (0.0, 1.0) or not fitted):  # of fitted codes only whole strips are exact
        assert plan.predicted_loss == pytest.approx(
            sum(float(profile.losses[s.name][profile.statistics[s.name][EXACT] == 0, -1].sum()) for s in profile.sites)
        )


def test_levels_that_only_some_tiles_have_are_not_enough() -> None:
    with pytest.raises(fv.BudgetError, match="add levels of planes"):
        fv.allocate(_profile(0, 0.5, False), fv.Budget(bits=8), fv.Constraints(levels=(16, 32)))


def test_a_budget_of_loss_takes_exact_tiles_where_nothing_else_does() -> None:
    profile = _profile(1, 1.0, False)
    plan = fv.allocate(profile, fv.Budget(loss=1e-6))
    assert plan.predicted_loss == 0
    assert {plan.levels[s.name] for s in profile.sites} == {16, 32}
    plain = replace(profile, statistics={})
    with pytest.raises(fv.BudgetError, match="no map loses as little"):
        fv.allocate(plain, fv.Budget(loss=1e-6))
    chain = fv.frontier(profile, 20)
    assert chain[0].predicted_loss == 0
    assert chain[len(chain) - 1].levels["layer0:weight"] == 2


def test_times_of_exact_levels_follow_their_bytes() -> None:
    profile = _profile(2, 1.0, False)
    timed = fv.Timings(machine="m", products={s.name: (0, 1, 2, 3, 4, 5) for s in profile.sites}, rest=1.0)
    site = profile.sites[0]
    bytes_at = dict(zip((0, 2, 3, 4, 6, 8, 16, 32), site.tile_costs(), strict=True))
    assert timed.site_seconds(site, (8, 16, 32)) == [5, 5 * bytes_at[16] / bytes_at[8], 5 * bytes_at[32] / bytes_at[8]]
    assert timed.seconds_of(profile.uniform(16)) > timed.seconds_of(profile.uniform(8))
    plan = fv.allocate(replace(profile, timings=timed), fv.Budget(latency=20.0))
    assert timed.seconds_of(plan) <= 20.0 * (1 + 1e-6)
