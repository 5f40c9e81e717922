"""A live model that follows its task: moves between passes, for the same bytes, and withdraws cleanly."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import DataError, FoveateError
from foveate.importance.moves import Caution
from foveate.importance.options import PATENT, Shadow
from foveate.importance.verdict import heat_map
from foveate.nn.foreign.cache_argument import cache_of
from tiny import TRANSFORMER, generator, llama, quick_tracking

BUDGET = fv.Budget(bits=4.0)
QUICK = quick_tracking(warm_up=16, caution=Caution(margin=0.05))


class Switched(nn.Module):
    """Two branches, of which a row takes that of the side on which its first number lies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        # each branch sees its own half of the rows' energy
        first, second = x.clamp(min=0), x.clamp(max=0)
        return self.head(torch.tanh(self.branches[0](first)) + torch.tanh(self.branches[1](second)))


def _rows(side: float, count: int = 32, seed: int = 0) -> Tensor:
    """Rows whose numbers are mostly positive (side 1), mostly negative (-1), or both (0)."""
    x = torch.randn(count, 64, generator=generator(seed))
    return x if side == 0 else torch.where(x * side > 0, x, 0.05 * x)


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, fv.Profile]:
    model = Switched().eval()
    profile = fv.quantize(model, [_rows(0, 256, seed) for seed in range(3)], objective=fv.Logits(), progress=False)
    return model, profile


@pytest.fixture
def model(made: tuple[nn.Module, fv.Profile]) -> nn.Module:
    return copy.deepcopy(made[0])


def _run(model: nn.Module, side: float, passes: int = 12) -> None:
    with torch.no_grad():
        for seed in range(passes):
            model(_rows(side, seed=100 + seed))


def test_bits_follow_the_task_within_the_budget_and_come_back(model: nn.Module) -> None:
    before = fv.current_map(model)
    static = fv.allocate(fv.profile_of(model), BUDGET)
    sites = {s.name: s for s in static.weight_sites()}
    first, second = sites["branches.0:weight"], sites["branches.1:weight"]
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        assert fv.current_map(model) == static
        assert fv.state_of(model).frontier_by == tracker.name
        _run(model, 1)
        now = fv.current_map(model)
        assert now.bytes_resident <= static.bytes_resident
        assert now.mean_level(first) > static.mean_level(first) > now.mean_level(second)
        assert tracker.source == "online"
        assert tracker.verdict.moves >= 1
        assert "shift seen" in str(tracker.verdict)
        _run(model, -1, 24)
        assert fv.current_map(model).mean_level(second) > fv.current_map(model).mean_level(first)
        tags = fv.importance_of(model)
        assert float(tags[second.name].importance.sum()) > float(tags[first.name].importance.sum())
        assert second.name in heat_map(tracker.history)
        assert "importance" in heat_map(tracker.history, importance=True)
    assert fv.current_map(model) == before
    assert tracker.name not in fv.state_of(model).frontiers
    tracker.close()  # twice does no harm


def test_nothing_moves_at_rest(model: nn.Module) -> None:
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        _run(model, 0, 40)
    assert tracker.verdict.moves == 0
    assert str(tracker).startswith("no shift, static is fine (1280 tokens")


def test_levels_never_change_within_a_pass(model: nn.Module) -> None:
    seen: list[tuple[Any, Any]] = []
    begun: list[Any] = []
    model.branches[0].register_forward_pre_hook(lambda *_: begun.append(fv.current_map(model)))  # type: ignore[union-attr,operator]
    model.head.register_forward_hook(lambda *_: seen.append((begun[-1], fv.current_map(model))))  # type: ignore[union-attr,operator]
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        _run(model, 1)
        assert tracker.verdict.moves
    assert seen
    assert all(one is other for one, other in seen)


def test_every_map_of_the_frontier_in_force_is_a_budget(model: nn.Module) -> None:
    chain = fv.frontier(fv.profile_of(model), 6)
    fv.apply(model, chain)
    fv.set_index(model, 3, decider="manager")
    with fv.track_importance(model, options=QUICK) as tracker:
        assert fv.state_of(model).frontier is chain  # nothing is handed over before there is a reason
        _run(model, 1)
        state = fv.state_of(model)
        assert state.frontier_by == tracker.name
        assert state.index == 3
        assert len(state.frontier) == len(chain)
        for mine, theirs in zip(state.frontier, chain, strict=True):
            assert mine.bytes_resident <= theirs.bytes_resident
        fv.withdraw(model, "manager")
        assert fv.state_of(model).index == 0
        # the user hands over another frontier: it is the source of the budgets from the next decision on
        fv.apply(model, fv.profile_of(model).uniform(3))
        _run(model, -1, 6)
        assert len(fv.state_of(model).frontier) == 1
        assert fv.current_map(model).bytes_resident <= fv.profile_of(model).uniform(3).bytes_resident
    assert fv.current_map(model) == fv.profile_of(model).uniform(3)


def test_what_is_not_needed_is_zeroed_and_comes_back(model: nn.Module) -> None:
    zero = fv.Constraints(levels=(0, 2, 3, 4, 6, 8))
    site = next(s for s in fv.profile_of(model).weight_sites() if s.name == "branches.1:weight")
    options = replace(QUICK, shadow=None)
    with fv.track_importance(model, fv.Budget(bits=3.0), options=options, constraints=zero):
        _run(model, 1, 20)
        zeros = fv.current_map(model).counts(site)[0]
        assert zeros > 0
        _run(model, -1, 40)
        assert fv.current_map(model).counts(site)[0] < zeros


def test_a_shadow_run_refuses_what_is_worse(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.importance import tracker as room

    monkeypatch.setattr(room, "divergences", lambda *args: {name: 2.0 if name == "online" else 1.0 for name in args[3]})
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        _run(model, 1)
        assert fv.current_map(model) == fv.allocate(fv.profile_of(model), BUDGET)
    verdict = tracker.verdict
    assert verdict.moves == 0
    assert len(verdict.decisions) >= 1
    # it is asked again, but ever more rarely
    assert len(verdict.decisions) <= 3
    assert "refused" in str(verdict.decisions[0])
    assert "moves refused" in str(verdict)


def test_a_shadow_run_rolls_back_to_the_static_map(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.importance import tracker as room

    with fv.track_importance(model, BUDGET, options=replace(QUICK, shadow=Shadow(every=64))) as tracker:
        _run(model, 1)
        assert tracker.source == "online"
        monkeypatch.setattr(
            room, "divergences", lambda *args: {name: 0.5 if name == "static" else 1.0 for name in args[3]}
        )
        _run(model, 1, 6)
        assert tracker.source == "static"
        assert fv.current_map(model) == fv.allocate(fv.profile_of(model), BUDGET)


def test_nan_in_a_stream_changes_nothing(model: nn.Module) -> None:
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        with torch.no_grad():
            for _ in range(8):
                model(torch.full((32, 64), float("nan")))
        assert tracker.verdict.refused_observations > 0
        assert not tracker.verdict.decisions
        assert "observations with NaN or Inf left out" in str(tracker)


def test_known_tasks_are_candidates(model: nn.Module) -> None:
    tasks = []
    for name, side in (("plus", 1.0), ("minus", -1.0)):
        with fv.track_importance(model, BUDGET, options=replace(QUICK, warm_up=0)) as tracker:
            _run(model, side)
            tasks.append(tracker.task(name))
    options = replace(QUICK, caution=Caution(margin=0.99), shadow=Shadow(every=64))
    with fv.track_importance(model, BUDGET, options=options, tasks=tasks) as tracker:
        _run(model, 1, 16)
        assert tracker.source == "plus"
        _run(model, -1, 24)
        assert tracker.source == "minus"
        assert sum(tracker.shares.values()) == pytest.approx(1.0)
    with fv.track_importance(model, BUDGET, options=QUICK, warm_up=tasks[0]) as tracker:
        assert float(tracker.tags()["branches.0:weight"].importance.sum()) > 0
    with pytest.raises(DataError, match="names differ"):
        fv.track_importance(model, BUDGET, tasks=[tasks[0], tasks[0]])


def test_the_rules_of_the_patent_start_at_8_bits(model: nn.Module) -> None:
    options = replace(PATENT, decide_every=32)
    with fv.track_importance(model, options=options) as tracker:
        assert {level for s, level in fv.current_map(model).levels.items() if s.endswith("weight")} == {8}
        _run(model, 1, 8)
        assert tracker.verdict.decisions
        assert fv.current_map(model) != fv.profile_of(model).uniform(8)


def test_one_tracker_at_a_time_and_copies_are_free(model: nn.Module) -> None:
    with fv.track_importance(model, BUDGET, options=QUICK) as tracker:
        with pytest.raises(FoveateError, match=f"followed already, by {tracker.name}"):
            fv.track_importance(model)
        other = copy.deepcopy(model)
        _run(other, 1)
        assert tracker.verdict.tokens == 0
        # a measurement by another decider is not part of the stream
        fv.measure(model, [fv.profile_of(model).uniform(4)], [_rows(1, 256)], progress=False)
        assert tracker.verdict.tokens == 0
    fv.track_importance(model).close()


@pytest.mark.parametrize("order", list(itertools.permutations(("tracker", "manager", "watch"))))
def test_deciders_can_leave_in_any_order(model: nn.Module, order: tuple[str, ...]) -> None:
    chain = fv.frontier(fv.profile_of(model), 6)
    fv.apply(model, chain)
    tracker = fv.track_importance(model, options=replace(QUICK, shadow=None))
    watch = fv.watch_inputs(model)
    fv.set_index(model, 2, decider="manager")
    with torch.no_grad():
        for seed in range(20):
            model(8 * _rows(1, seed=seed))
    assert tracker.verdict.moves
    assert watch.raised
    assert fv.state_of(model).raises
    leave = {"tracker": tracker.close, "manager": lambda: fv.withdraw(model, "manager"), "watch": watch.close}
    present = set(order)
    for name in order:
        leave[name]()
        present.remove(name)
        state = fv.state_of(model)
        assert (state.frontier is chain) == ("tracker" not in present)
        assert state.index == (2 if "manager" in present else 0)
        assert "watch" in present or not state.raises
    assert fv.current_map(model) == chain[0]
    assert set(fv.state_of(model).frontiers) == {"user"}


def test_experts_and_embeddings_are_followed_in_a_mixture() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TRANSFORMER, num_local_experts=4, num_experts_per_tok=2)
    mixture = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(3, 50, (8, 24), generator=generator(1))
    profile = fv.quantize(mixture, [{"input_ids": part} for part in ids.chunk(2)], progress=False)
    options = replace(QUICK, warm_up=0, shadow=None)
    with fv.track_importance(mixture, BUDGET, options=options) as tracker:
        with torch.no_grad():
            for part in ids.chunk(2):
                mixture(input_ids=part, use_cache=False)
        means = tracker.task("the same").means
    from foveate.importance.rolling import baseline

    # the calibration data again: what is seen is what calibration saw, but for the inputs of planes
    for name, mean in baseline(profile).items():
        torch.testing.assert_close(means[name], mean, rtol=0.15, atol=float(mean.mean()) * 0.15, msg=name)


def test_calls_with_a_cache_are_not_repeated() -> None:
    from foveate.importance.shadow import repeatable

    made = llama()
    ids = torch.randint(3, 50, (2, 6), generator=generator(1))
    first = repeatable((), {"input_ids": ids, "use_cache": True, "attention_mask": torch.ones(2, 6)}, 100)
    assert first is not None
    assert first.tokens == 6
    assert first.kwargs["use_cache"] is False
    assert first.kwargs["attention_mask"].shape == (1, 6)
    cache = cache_of(made(input_ids=ids, use_cache=True))
    for name in ("cache", "past_key_values"):
        assert repeatable((), {"input_ids": ids[:, :1], name: cache}, 100) is None
        assert repeatable((), {"input_ids": ids, name: type(cache)()}, 100) is not None
    assert repeatable((ids,), {}, 5) is None
    assert repeatable((), {}, 5) is None


def test_deciding_by_hand_where_nothing_can_be_observed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 8))
    profile = fv.quantize(model, [torch.randn(4, 4, 8, 8) for _ in range(2)], objective=fv.Logits(), progress=False)
    fv.apply(model, fv.frontier(profile, 4))
    with fv.track_importance(model, options=replace(QUICK, by_hand=True)) as tracker:
        with torch.no_grad():
            for _ in range(30):
                model(torch.randn(4, 4, 8, 8))
                tracker.step()
        assert not tracker.verdict.moves  # nothing was shown for shadow runs, so no move was checked
        tracker.show(torch.randn(1, 4, 8, 8))
    tracker.step()  # ended: nothing to decide, and nothing to wait for
