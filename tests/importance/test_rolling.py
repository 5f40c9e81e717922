"""The pure estimate of importance: decayed means without bias, ratios to calibration, and no NaN ever."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import DataError, SiteError
from foveate.importance.contribution import magnitude, start_contributions, update_contributions
from foveate.importance.rolling import Decay, Seen, baseline, of_tiles, ratios, rescaled, start, update
from foveate.precision.maps import Site
from foveate.precision.profiles import Profile
from frontiers import random_profile
from tiny import generator

SITE = Site("layer:weight", "weight", 40, 70, 32)
EXPERTS = tuple(Site(f"block.experts.{i}.down_proj:weight", "weight", 32, 64, 32, False, 1) for i in range(3))


def _profile() -> Profile:
    """Statistics of inputs for a random profile."""
    profile = random_profile(0)
    g = generator(3)
    kept = {s.name: {"input_energy": torch.rand(s.grid[1], generator=g) + 0.1} for s in profile.weight_sites()}
    return replace(profile, statistics=kept)


def _expert_profile(frequencies: tuple[float, ...] = (0.5, 0.25, 0.0)) -> Profile:
    losses = {s.name: torch.rand(s.tiles, 6, generator=generator(1)).sort(1, descending=True).values for s in EXPERTS}
    kept = {
        s.name: {"input_energy": torch.full((2,), 2.0 if f else 0.0), "routing_frequency": torch.tensor([f])}
        for s, f in zip(EXPERTS, frequencies, strict=True)
    }
    return Profile(EXPERTS, losses, 0, 100, "logits", kept)


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_the_estimate_is_the_mean_over_tokens_decayed_by_tokens() -> None:
    decay = Decay(keep=0.5, tokens=10)
    state = start({"w": _row(0.0)})
    for value, tokens in ((1.0, 10), (3.0, 20), (5.0, 10)):
        state = update(state, {"w": Seen(sums=_row(value * tokens), tokens=tokens)}, decay, tokens)
    # weights: what was seen longest ago was halved by 30 tokens, then by 10
    weights = (10 * 0.5**3, 20 * 0.5, 10.0)
    expected = (weights[0] * 1.0 + weights[1] * 3.0 + weights[2] * 5.0) / sum(weights)
    assert float(state.means()["w"]) == pytest.approx(expected, rel=1e-12)
    assert state.tokens == 40


@given(st.floats(0.1, 100), st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_a_steady_stream_is_estimated_without_bias_from_the_first_token(
    value: float, counts: list[int], keep: float
) -> None:
    for decay in (Decay(keep=keep, tokens=50), Decay(keep=keep, tokens=None)):
        state = start({"w": _row(7.0)})
        for tokens in counts:
            state = update(state, {"w": Seen(sums=_row(value * tokens), tokens=tokens)}, decay, tokens)
        assert float(state.means()["w"]) == pytest.approx(value, rel=1e-9)


def test_a_warm_up_counts_as_tokens_and_is_forgotten() -> None:
    decay = Decay(keep=0.5, tokens=100)
    state = start({"w": _row(4.0)}, tokens=100)
    assert float(state.means()["w"]) == 4.0
    state = update(state, {"w": Seen(sums=_row(0.0), tokens=100)}, decay, 100)
    assert float(state.means()["w"]) == pytest.approx(4 * 50 / 150)
    for _ in range(20):
        state = update(state, {"w": Seen(sums=_row(0.0), tokens=100)}, decay, 100)
    assert float(state.means()["w"]) < 1e-4


@given(st.lists(st.sampled_from([1.0, 2.0, math.nan, math.inf, -math.inf, -1.0]), min_size=1, max_size=6))
def test_nan_and_inf_never_enter(values: list[float]) -> None:
    state = start({"w": _row(1.0, 1.0)}, tokens=1)
    for value in values:
        state = update(state, {"w": Seen(sums=_row(2.0, value), tokens=1)}, Decay(), 1)
        state = update(state, {"w": Seen(sums=_row(2.0, 1.0), tokens=value)}, Decay(), 1)
    assert bool(torch.isfinite(state.means()["w"]).all())
    assert bool((state.means()["w"] > 0).all())
    bad = [value for value in values if not (math.isfinite(value) and value > 0)]
    assert state.refused == 2 * len(bad)


def test_what_has_another_shape_or_is_not_followed_is_left_out() -> None:
    state = start({"w": _row(1.0)}, tokens=1)
    seen = {"w": Seen(sums=_row(1.0, 2.0), tokens=5), "other": Seen(sums=_row(1.0), tokens=5)}
    after = update(state, seen, Decay(), 5)
    assert after.refused == 1
    assert set(after.weights) == {"w"}
    assert torch.equal(after.means()["w"], state.means()["w"])


def test_ratios_of_the_calibrations_own_means_are_one() -> None:
    profile = _profile()
    found = ratios(profile, start(baseline(profile), tokens=10).means())
    for site in profile.weight_sites():
        assert found[site.name].shape == (site.tiles,)
        torch.testing.assert_close(found[site.name], torch.ones(site.tiles, dtype=torch.float64))


def test_losses_follow_the_energy_of_their_own_group() -> None:
    profile = _profile()
    site = profile.weight_sites()[0]
    means = baseline(profile)
    means[site.name] = means[site.name] * torch.arange(1, site.grid[1] + 1)
    by = ratios(profile, means)
    scaled = rescaled(profile, by)
    expected = profile.losses[site.name].view(*site.grid, 6) * by[site.name].view(*site.grid)[..., None]
    torch.testing.assert_close(scaled.losses[site.name].view_as(expected).double(), expected.double())
    # within the thousandth that both sides are given
    assert by[site.name].view(site.grid)[0].tolist() == pytest.approx(range(1, site.grid[1] + 1), rel=0.02)
    other = profile.weight_sites()[1].name
    torch.testing.assert_close(scaled.losses[other], profile.losses[other])


def test_experts_count_as_often_as_they_are_met() -> None:
    profile = _expert_profile()
    means = baseline(profile)
    assert float(means[EXPERTS[0].name][0, 0]) == 1.0
    assert float(means[EXPERTS[1].name][0, 0]) == 0.5
    # never met: the average expert, met half a time in 100 samples
    assert float(means[EXPERTS[2].name][0, 0]) == pytest.approx(2.0 * 0.5 / 100)
    state = start(means)
    seen = {
        EXPERTS[0].name: Seen(sums=_row(0.0, 0.0), tokens=64),
        EXPERTS[2].name: Seen(sums=_row(32.0, 32.0), tokens=64),
    }
    by = ratios(profile, update(state, seen, Decay(), 64).means())
    assert float(by[EXPERTS[0].name].max()) == pytest.approx(1e-3, rel=0.01)
    assert float(by[EXPERTS[1].name][0]) == 1.0  # not seen, and without a warm-up not known
    assert float(by[EXPERTS[2].name].min()) == pytest.approx(50, rel=0.01)


def test_an_embedding_is_followed_by_strips_also_where_it_has_as_many_groups() -> None:
    site = Site("embed:weight", "weight", 32, 64, 32)
    losses = {site.name: torch.ones(site.tiles, 6)}
    kept = {site.name: {"row_frequency": torch.tensor([0.75, 0.25])}}
    profile = Profile((site,), losses, 0, 10, "logits", kept)
    by = ratios(profile, {site.name: torch.tensor([[0.25], [0.75]], dtype=torch.float64)})[site.name].view(site.grid)
    assert by[0].tolist() == pytest.approx([1 / 3, 1 / 3], rel=0.01)
    assert by[1].tolist() == pytest.approx([3.0, 3.0], rel=0.01)


def test_values_of_groups_and_strips_are_spread_over_tiles() -> None:
    assert of_tiles(SITE, _row(1, 2, 3)).tolist() == [1, 2, 3] * 3
    assert of_tiles(SITE, _row(1, 2, 3).t()).tolist() == [1] * 3 + [2] * 3 + [3] * 3


def test_errors_name_the_value_and_the_rule() -> None:
    with pytest.raises(DataError, match=r"keep \(=1\) is not above 0 and below 1"):
        Decay(keep=1)
    with pytest.raises(DataError, match=r"tokens \(=0\) is not a positive whole number"):
        Decay(tokens=0)
    with pytest.raises(DataError, match="w is not finite"):
        start({"w": _row(math.nan)})
    with pytest.raises(DataError, match=r"tokens \(=-1\)"):
        start({"w": _row(1.0)}, tokens=-1)
    profile = _profile()
    with pytest.raises(SiteError, match="a mean of shape"):
        ratios(profile, {profile.weight_sites()[0].name: _row(1.0)})


def test_the_plain_contribution_starts_at_zero_and_moves_by_a_tenth() -> None:
    w = torch.randn(40, 70, generator=generator(5))
    sizes = {SITE.name: magnitude(w, SITE)}
    first_tile = w[:16, :32].abs().mean()
    assert float(sizes[SITE.name][0]) == pytest.approx(float(first_tile), rel=1e-6)
    # of the last tile only 8 rows and 6 columns are not padding
    assert float(sizes[SITE.name][-1]) == pytest.approx(float(w[32:, 64:].abs().sum()) / (16 * 32), rel=1e-6)
    state = start_contributions({SITE.name: SITE})
    assert not bool(state[SITE.name].any())
    seen = {SITE.name: Seen(sums=_row(4.0, 16.0, 64.0), tokens=4)}
    state = update_contributions(state, seen, sizes, {SITE.name: SITE}, 0.9)
    expected = 0.1 * sizes[SITE.name] * of_tiles(SITE, _row(1.0, 2.0, 4.0))
    torch.testing.assert_close(state[SITE.name], expected)
    bad = {SITE.name: Seen(sums=_row(4.0, math.nan, 1.0), tokens=4)}
    assert torch.equal(update_contributions(state, bad, sizes, {SITE.name: SITE}, 0.9)[SITE.name], state[SITE.name])
