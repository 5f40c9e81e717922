from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveate as fv
from foveate.allocate.problem import build
from foveate.allocate.solve import solve_loss
from foveate.errors import BudgetError, SiteError
from foveate.precision.maps import PrecisionMap, Site
from foveate.precision.profiles import Profile
from tiny import generator

LEVELS = (0, 2, 3, 4, 6, 8)
NESTED = (2, 3, 4, 6, 8)


def _profile(shapes: list[tuple[int, int, int]], seed: int, convex: bool = True, other: int = 1000) -> Profile:
    """Losses that fall about fourfold a bit, or falling anyhow."""
    g = generator(seed)
    sites, losses = [], {}
    for i, (rows, columns, group) in enumerate(shapes):
        site = Site(f"layer{i}:weight", "weight", rows, columns, group, bool(i % 2), rows)
        size = torch.rand(site.tiles, 1, generator=g).mul(6).exp()
        if convex:
            table = size * torch.tensor([20.0, 1.0, 0.25, 0.0625, 0.004, 0.00025])
        else:
            table = size * torch.rand(site.tiles, 6, generator=g)
        sites += [site, Site(f"layer{i}:input", "input", 0, columns)]
        losses[site.name] = table
    return Profile(tuple(sites), losses, other, 10, "logits")


SHAPES = [(64, 300, 128), (100, 96, 32), (16, 1000, 64), (33, 40, 32)]
profiles = st.builds(_profile, st.just(SHAPES), st.integers(0, 10**6), st.booleans())


@given(profile=profiles, share=st.floats(0, 1))
def test_bytes_are_never_exceeded_and_hardly_missed(profile: Profile, share: float) -> None:
    low, high = profile.uniform(2), profile.uniform(8)
    budget = round(low.bytes_resident + share * (high.bytes_resident - low.bytes_resident))
    plan = fv.allocate(profile, fv.Budget(bytes=budget))
    assert plan.bytes_resident <= budget
    assert plan.predicted_loss == pytest.approx(profile.predict(plan), rel=1e-5)
    # what is left is less than the dearest step of any tile, or no step is worth anything
    left = budget - plan.bytes_resident
    worthless = all(
        profile.losses[s.name][:, 5].sum() >= profile.losses[s.name][:, LEVELS.index(2)].sum()
        for s in profile.weight_sites()
    )
    assert left <= 6 * 128 * 2 or plan.predicted_loss <= _best(profile) * (1 + 1e-9) or worthless


def _best(profile: Profile) -> float:
    return sum(float(profile.losses[s.name][:, 1:].double().min(1).values.sum()) for s in profile.weight_sites())


@given(seed=st.integers(0, 10**6), bits=st.floats(2.8, 8.6))
def test_bits_are_met_within_half_a_percent_of_many_tiles(seed: int, bits: float) -> None:
    profile = _profile([(512, 512, 128), (256, 512, 64)], seed)
    top = profile.uniform(8).bits
    plan = fv.allocate(profile, fv.Budget(bits=bits))
    assert plan.bits <= bits
    assert plan.bits >= min(bits, top) * 0.995
    target = profile.other_bytes + round(bits * 60000)
    by_bytes = fv.allocate(profile, fv.Budget(bytes=target))
    assert by_bytes.bytes_resident <= target
    assert by_bytes.bytes_resident >= min(target, profile.uniform(8).bytes_resident) * 0.995


@given(profile=profiles, share=st.floats(0.001, 1))
def test_a_loss_budget_is_kept(profile: Profile, share: float) -> None:
    worst, best = profile.uniform(2).predicted_loss, _best(profile)
    limit = best + share * (worst - best)
    plan = fv.allocate(profile, fv.Budget(loss=limit))
    assert plan.predicted_loss <= limit * (1 + 1e-6)
    assert profile.predict(plan) <= plan.predicted_loss * (1 + 1e-5)
    # a map of that many bytes can hardly be had for less loss
    again = fv.allocate(profile, fv.Budget(bytes=plan.bytes_resident))
    assert again.predicted_loss >= best * (1 - 1e-6)


@settings(max_examples=100)
@given(profile=profiles, level=st.sampled_from(NESTED))
def test_no_worse_than_uniform(profile: Profile, level: int) -> None:
    even = profile.uniform(level)
    for budget in (fv.Budget(bytes=even.bytes_resident), fv.Budget(bits=even.bits)):
        plan = fv.allocate(profile, budget)
        assert plan.bytes_resident <= even.bytes_resident
        assert plan.predicted_loss <= even.predicted_loss * (1 + 1e-6)
    cheaper = fv.allocate(profile, fv.Budget(loss=even.predicted_loss))
    assert cheaper.predicted_loss <= even.predicted_loss * (1 + 1e-6)


@settings(max_examples=50)
@given(
    table=st.lists(st.lists(st.floats(0, 10, width=32), min_size=5, max_size=5), min_size=1, max_size=5),
    room=st.floats(0, 1),
    level=st.sampled_from(NESTED),
)
def test_against_brute_force(table: list[list[float]], room: float, level: int) -> None:
    """Every choice of a few tiles: the hull misses the best by less than the largest single step."""
    tiles = len(table)
    site = Site("a:weight", "weight", 16 * tiles, 128, 128)
    loss = torch.tensor([[100.0, *sorted(row, reverse=True)] for row in table])
    profile = Profile((site,), {"a:weight": loss}, 0, 1, "logits")
    low, high = profile.uniform(2).bytes_resident, profile.uniform(8).bytes_resident
    for budget in (round(low + room * (high - low)), profile.uniform(level).bytes_resident):
        plan = fv.allocate(profile, fv.Budget(bytes=budget))
        costs = [2 * 128 * b for b in NESTED]
        best = min(
            sum(float(loss[t, 1 + c]) for t, c in enumerate(choice))
            for choice in itertools.product(range(5), repeat=tiles)
            if low + sum(costs[c] - costs[0] for c in choice) <= budget
        )
        step = float((loss[:, 1] - loss[:, 5]).max())
        assert plan.bytes_resident <= budget
        assert best - 1e-6 <= plan.predicted_loss <= best + step + 1e-6
        even = profile.uniform(level)
        if even.bytes_resident <= budget:
            assert plan.predicted_loss <= even.predicted_loss + 1e-6


@given(profile=profiles)
def test_more_bytes_never_lose_more(profile: Profile) -> None:
    low, high = profile.uniform(2).bytes_resident, profile.uniform(8).bytes_resident
    losses = [fv.allocate(profile, fv.Budget(bytes=low + (high - low) * i // 12)).predicted_loss for i in range(13)]
    step = max(float(t[:, 1:].max() - t[:, 1:].min()) for t in profile.losses.values())
    assert all(b <= a + step * 1e-6 + 1e-9 for a, b in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("level", NESTED)
def test_a_maps_own_bytes_bits_and_loss_can_be_had_again(level: int) -> None:
    for seed in range(20):
        profile = _profile(SHAPES, seed)
        even = profile.uniform(level)
        plan = fv.allocate(profile, fv.Budget(bits=even.bits))
        assert plan.bits <= even.bits
        assert fv.allocate(profile, fv.Budget(bits=plan.bits)) == plan
        assert fv.allocate(profile, fv.Budget(bytes=plan.bytes_resident)).predicted_loss <= plan.predicted_loss
        again = fv.allocate(profile, fv.Budget(loss=even.predicted_loss))
        assert again.predicted_loss <= even.predicted_loss * (1 + 1e-6)
        assert again.bytes_resident <= even.bytes_resident
        # without tiles to choose among, the map itself
        whole = fv.allocate(
            profile, fv.Budget(bytes=even.bytes_resident), fv.Constraints(levels=[level], per_tile=False)
        )
        assert whole == even


@given(profile=profiles, share=st.floats(0.05, 0.95))
def test_ties_and_whole_weights(profile: Profile, share: float) -> None:
    low, high = profile.uniform(2).bytes_resident, profile.uniform(8).bytes_resident
    budget = fv.Budget(bytes=round(low + share * (high - low)))
    tied = fv.allocate(profile, budget, fv.Constraints(tie=[("layer0:*", "layer1:weight")]))
    assert tied.levels["layer0:weight"] == tied.levels["layer1:weight"]
    assert isinstance(tied.levels["layer0:weight"], int)
    whole = fv.allocate(profile, budget, fv.Constraints(per_tile=False))
    assert all(isinstance(v, int) for v in whole.levels.values())


def test_dropped_tiles() -> None:
    profile = _profile(SHAPES, 1)
    profile.losses["layer3:weight"][:] = 0.0
    plan = fv.allocate(profile, fv.Budget(bits=4), fv.Constraints(levels=LEVELS))
    assert plan.levels["layer3:weight"] == 0
    assert fv.allocate(profile, fv.Budget(bits=4)).levels["layer3:weight"] == 2


def test_a_level_that_looks_worse_than_a_lower_one_is_not_bought() -> None:
    site = Site("a:weight", "weight", 16, 128, 128)
    loss = torch.tensor([[9.0, 1.0, 2.0, 2.0, 2.0, 2.0]])
    profile = Profile((site,), {"a:weight": loss}, 0, 1, "logits")
    assert fv.allocate(profile, fv.Budget(bits=9)).levels["a:weight"] == 2


def test_inputs_follow_their_weights_unless_told() -> None:
    profile = _profile(SHAPES, 1)
    plan = fv.allocate(profile, fv.Budget(bits=20))
    assert {plan.levels[s.name] for s in profile.sites if s.kind == "input"} == {16}
    plan = fv.allocate(profile, fv.Budget(bits=4))
    for i in range(4):
        mean = plan.mean_level(profile.sites[2 * i])
        assert plan.levels[f"layer{i}:input"] == (16 if mean > 6 else 8)
    plan = fv.allocate(profile, fv.Budget(bits=20), fv.Constraints(input_level=32))
    assert {plan.levels[s.name] for s in profile.sites if s.kind == "input"} == {32}


def test_inputs_of_aliases_follow_the_tied_weight() -> None:
    tied = Site("embed:weight", "weight", 32, 64, 32, aliases=("head:weight",))
    profile = Profile((tied, Site("head:input", "input", 0, 64)), {tied.name: torch.rand(4, 6)}, 0, 1, "logits")
    assert fv.allocate(profile, fv.Budget(bits=20), fv.Constraints(levels=[8])).levels["head:input"] == 16


def test_what_cannot_be_met_says_the_least_possible() -> None:
    profile = _profile(SHAPES, 1)
    low = profile.uniform(2)
    with pytest.raises(BudgetError, match=rf"no map fits in 100 B: the least .*is .* \({low.bytes_resident} bytes\)"):
        fv.allocate(profile, fv.Budget(bytes=100))
    with pytest.raises(BudgetError, match=rf"no map averages 2 bits a weight: the least possible is {low.bits:.4f}"):
        fv.allocate(profile, fv.Budget(bits=2))
    with pytest.raises(BudgetError, match=r"no map loses as little as 1e-12: the least predicted loss is"):
        fv.allocate(profile, fv.Budget(loss=1e-12))
    exactly = fv.allocate(profile, fv.Budget(bytes=low.bytes_resident))
    assert exactly.bytes_resident == low.bytes_resident
    with pytest.raises(BudgetError):
        fv.allocate(profile, fv.Budget(bytes=low.bytes_resident - 1))


def test_malformed_problems() -> None:
    profile = _profile(SHAPES, 1)
    budget = fv.Budget(bits=4)
    with pytest.raises(SiteError, match="matches none"):
        fv.allocate(profile, budget, fv.Constraints(tie=[("nothing",)]))
    with pytest.raises(SiteError, match="is in two tied groups"):
        fv.allocate(profile, budget, fv.Constraints(tie=[("layer0:*",), ("layer*:weight",)]))
    with pytest.raises(BudgetError, match="no weights"):
        fv.allocate(Profile((), {}, 0, 1, "logits"), budget)
    bad = {**profile.losses, "layer0:weight": torch.full_like(profile.losses["layer0:weight"], math.nan)}
    with pytest.raises(BudgetError, match="not finite"):
        fv.allocate(replace(profile, losses=bad), budget)


def _tiles(plan: PrecisionMap, site: Site) -> Tensor:
    levels = plan.levels[site.name]
    return torch.tensor(list(bytes([levels]) * site.tiles if isinstance(levels, int) else levels))


@given(profile=profiles, points=st.integers(2, 40))
def test_the_frontier_is_nested_and_ordered(profile: Profile, points: int) -> None:
    maps = fv.frontier(profile, points)
    assert 1 <= len(maps) <= points
    assert maps[len(maps) - 1].bytes_resident == profile.uniform(2).bytes_resident
    assert maps[0].predicted_loss == pytest.approx(_best(profile), rel=1e-6)
    for better, cheaper in itertools.pairwise(maps):
        assert cheaper.bytes_resident < better.bytes_resident
        assert cheaper.predicted_loss >= better.predicted_loss
        for site in profile.weight_sites():
            assert bool((_tiles(cheaper, site) <= _tiles(better, site)).all())


def test_frontier_points() -> None:
    profile = _profile([(512, 512, 128)], 1)
    maps = fv.frontier(profile, 9)
    assert len(maps) == 9
    gaps = [a.bytes_resident - b.bytes_resident for a, b in itertools.pairwise(maps)]
    # steps are single tiles' upgrades
    assert max(gaps) - min(gaps) <= 2 * 6 * 128 * 2
    with pytest.raises(BudgetError, match=r"points \(=1\) must be at least 2"):
        fv.frontier(profile, 1)


def test_a_profile_without_losses_to_save_has_one_map() -> None:
    site = Site("a:weight", "weight", 64, 128, 128)
    profile = Profile((site,), {"a:weight": torch.zeros(4, 6)}, 0, 1, "logits")
    assert len(fv.frontier(profile, 5)) == 1
    assert fv.allocate(profile, fv.Budget(bits=9)).levels["a:weight"] == 2
    assert fv.allocate(profile, fv.Budget(loss=1.0)).levels["a:weight"] == 2


def test_a_handful_of_tiles_is_no_worse_than_uniform() -> None:
    for seed in range(120):
        g = generator(seed)
        tiles = int(torch.randint(1, 5, (1,), generator=g))
        loss = torch.rand(tiles, 6, generator=g).pow(1 + 3 * (seed % 2)).sort(1, descending=True).values
        site = Site("a:weight", "weight", 16 * tiles, 128, 128)
        profile = Profile((site,), {"a:weight": loss}, 0, 1, "logits")
        for level in NESTED:
            even = profile.uniform(level)
            plan = fv.allocate(profile, fv.Budget(bytes=even.bytes_resident))
            assert plan.predicted_loss <= even.predicted_loss * (1 + 1e-6)


@given(seed=st.integers(0, 400), part=st.floats(0.0, 1.0))
def test_a_loss_budget_is_one_of_predictions_where_levels_lose_alike(seed: int, part: float) -> None:
    plain = _profile([(16 * (1 + seed % 3), 64, 32)], seed)
    g = generator(seed)
    # at 8 bits the tables say no less than at 6, and all together more or less of it is measured
    flat = {name: torch.cat([t[:, :5], t[:, 4:5]], 1) for name, t in plain.losses.items()}
    factors = tuple((1 + 4 * torch.rand(6, generator=g)).tolist())
    profile = replace(plain, losses=flat, measured_over_summed=factors)
    problem = build(profile, fv.Constraints(levels=NESTED), None)
    low, high = (float(t.sum()) for t in (problem.predicted_UL.min(1).values, problem.predicted_UL[:, 0]))
    limit = low + part * max(high - low, 0.0)
    choice = solve_loss(problem, limit)
    assert float(problem.predicted_UL.gather(1, choice[:, None]).sum()) <= limit * (1 + 1e-6)
