"""The manager around small models: moves between passes, faults, two managers, suspension, and a log that replays."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.runtime.levels import ModelLevels
from foveate.runtime.manager import RuntimeManager
from foveate.runtime.options import ManagerOptions
from foveate.runtime.policy import Costs, Policy
from foveate.runtime.readings import Sensor
from foveate.runtime.records import replay
from foveate.runtime.status import find_status, status_folder
from frontiers import measured
from tiny import mlp, quantized_mlp, rows

TICK = 0.05


class Bench:
    """A model, a clock and a queue that the test moves."""

    def __init__(self, **options: Any) -> None:
        self.now, self.wait = 0.0, 0.0
        self.model, self.profile = quantized_mlp()
        self.options = {"background": False, "status": False, "clock": lambda: self.now, **options}

    def manager(self, limits: fv.Limits | None = None, **keywords: Any) -> RuntimeManager:
        sensors = keywords.pop("sensors", {"queue_wait": lambda: self.wait})
        return RuntimeManager(
            self.model,
            limits=limits or fv.Limits(queue_wait="200ms"),
            sensors=sensors,
            options=ManagerOptions(**self.options),
            **keywords,
        )

    def ticks(self, manager: RuntimeManager, count: int, wait: float | None = None) -> None:
        self.wait = self.wait if wait is None else wait
        for _ in range(count):
            self.now += TICK
            manager.step()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_precision_falls_under_pressure_and_comes_back_whole() -> None:
    bench = Bench()
    x = rows()[0]
    before, best = fv.current_map(bench.model), bench.model(x)
    with bench.manager() as manager:
        assert torch.equal(bench.model(x), best)  # index 0 is the static model
        bench.ticks(manager, 100, wait=1.0)
        assert manager.index == len(manager.frontier) - 1
        assert not torch.equal(bench.model(x), best)
        assert fv.current_map(bench.model) == manager.frontier[manager.index]
        bench.ticks(manager, 20 * 60 * 2, wait=0.0)
        assert manager.index == 0
        assert torch.equal(bench.model(x), best)
        assert all("queue_wait" in move.decision.reason for move in manager.moves)
        bench.ticks(manager, 20, wait=1.0)
        assert manager.index > 0
    assert fv.current_map(bench.model) is before
    assert torch.equal(bench.model(x), best)


def test_every_pass_is_read_at_one_index() -> None:
    bench = Bench()
    x = rows()[0]
    best = bench.model(x)
    with bench.manager() as manager:
        hook = bench.model[0].register_forward_hook(lambda *_: bench.ticks(manager, 20, wait=1.0))
        y = bench.model(x)
        hook.remove()
        assert manager.index > 0
        assert torch.equal(y, best)  # decided in the pass, in force after it
        assert not torch.equal(bench.model(x), best)
        assert fv.current_map(bench.model) == manager.frontier[manager.index]


def test_a_frontier_in_force_is_moved_along_and_other_deciders_count() -> None:
    bench = Bench()
    chain = fv.frontier(bench.profile, 8)
    fv.apply(bench.model, chain)
    with bench.manager() as manager:
        assert manager.frontier is chain
        bench.ticks(manager, 100, wait=1.0)
        assert fv.state_of(bench.model).indices == {"runtime": len(chain) - 1}
        with fv.floor(bench.model, index=1):
            assert fv.current_map(bench.model) is chain[1]
        fv.apply(bench.model, chain[2], decider="importance")
        assert fv.current_map(bench.model) is chain[2]
        bench.ticks(manager, 100, wait=1.0)
        fv.withdraw(bench.model, "importance")
        assert fv.current_map(bench.model) is chain[len(chain) - 1]
    assert fv.current_map(bench.model) is chain[0]
    assert fv.state_of(bench.model).indices == {}


def test_what_was_measured_of_a_frontier_is_what_its_indices_cost(tmp_path: Path) -> None:
    bench = Bench()
    chain = measured(fv.frontier(bench.profile, 8), 4, seed=1)
    fv.save(bench.model, tmp_path / "out", frontier=chain)
    bench.model = fv.load(tmp_path / "out", model=mlp())
    fv.apply(bench.model, chain[0])
    with bench.manager() as manager:
        assert manager.frontier == chain
        assert manager.setup.costs.kl == tuple(chain.kl(i) for i in range(len(chain)))
        assert manager.setup.costs.seconds_per_token == tuple(chain.seconds(i) for i in range(len(chain)))


def test_a_pass_that_fails_ends() -> None:
    bench = Bench()
    with bench.manager() as manager:
        with pytest.raises(fv.FoveateError, match="columns"):
            bench.model(torch.zeros(2, 3))
        bench.ticks(manager, 20, wait=1.0)
        assert fv.current_map(bench.model) == manager.frontier[manager.index] != manager.frontier[0]


def test_a_log_replays_bit_for_bit(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    bench = Bench(log=log)
    values: Iterator[float | str] = iter([math.nan, -1.0, "it died", math.inf] * 5)
    with bench.manager(fv.Limits(queue_wait=0.2, quality=1e-4, power=45)) as manager:
        for wait in (0.0, 0.3, 0.19, 1.7, 0.05, 0.0):
            bench.ticks(manager, 30, wait=wait + 1 / 3 * 1e-9)
            bench.model(rows()[0])
        indices = [move.decision.index for move in manager.moves]
        manager._sensors[1].sensor = Sensor(signal="queue_wait", read=lambda: next(values))
        bench.ticks(manager, 19)
    decisions = replay(log)
    assert len(decisions) == 6 * 30 + 19
    assert [d.index for d in decisions if d.index != d.before][: len(indices)] == indices
    assert len(indices) > 2
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:60], lines[60][:40]]))  # a crash while a line was written
    assert len(replay(log)) == 59
    changed = json.loads(lines[100])
    changed["decision"]["index"] += 1
    log.write_text("\n".join([*lines[:100], json.dumps(changed), ""]))
    with pytest.raises(fv.DataError, match="line 101"):
        replay(log)
    log.write_text('{"version": 99}\n')
    with pytest.raises(fv.DataError, match="version 99"):
        replay(log)
    log.write_text("[1]\n")
    with pytest.raises(fv.DataError, match="does not begin"):
        replay(log)


def test_two_managers_on_one_model_are_refused() -> None:
    bench = Bench()
    with bench.manager():
        with pytest.raises(fv.FoveateError, match=r"another RuntimeManager moves the levels of this Sequential"):
            bench.manager().start()
        with pytest.raises(fv.FoveateError, match="another RuntimeManager"):
            RuntimeManager(torch.nn.Sequential(bench.model), limits=fv.Limits(quality=1.0))
    with bench.manager() as manager:
        bench.ticks(manager, 1)


def test_a_manager_made_early_is_refused_when_it_starts_late() -> None:
    bench = Bench()
    early = bench.manager()
    with bench.manager(), pytest.raises(fv.FoveateError, match="another RuntimeManager"):
        early.start()
    fv.apply(bench.model, bench.profile.uniform(4))
    with pytest.raises(fv.FoveateError, match="another map was applied"):
        early.start()
    assert fv.current_map(bench.model) == bench.profile.uniform(4)


def test_a_suspended_process_does_not_fall() -> None:
    bench = Bench()
    with bench.manager() as manager:
        bench.ticks(manager, 4, wait=0.9)
        bench.now += 60.0
        bench.ticks(manager, 1)
        assert manager.index == 0
        bench.ticks(manager, 20)
        assert manager.index > 0


def test_a_sensor_that_hangs_is_held_and_then_made_safe(caplog: pytest.LogCaptureFixture) -> None:
    release, hang = threading.Event(), threading.Event()

    def wait() -> float:
        if hang.is_set():
            release.wait(20)
        return 0.0

    bench = Bench(policy=Policy(safe_index=2))
    with caplog.at_level(logging.WARNING, "foveate"), bench.manager(sensors={"queue_wait": wait}) as manager:
        bench.ticks(manager, 5)
        hang.set()
        for _ in range(12):  # few ticks, since each waits for the sensor
            bench.now += 0.4
            manager.step()
        assert manager.index == 2
        assert [m.decision.reason for m in manager.moves] == ["queue_wait stays at fault: the safe index"]
        release.set()
        hang.clear()
        bench.ticks(manager, 20 * 10)
        assert manager.index == 0
    said = [r.getMessage() for r in caplog.records if "queue_wait" in r.getMessage()]
    assert len(said) == 1
    assert "old" in said[0]


def test_a_prefetch_that_fails_leaves_the_index_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    fails, asked = [True], []

    def residency(index: int) -> None:
        asked.append(index)
        if fails[0] and asked[-1:] != asked[-2:-1] and len(asked) > 1 and asked[-1] < asked[-2]:
            raise OSError("the disk is gone")

    bench = Bench(residency=residency)
    with caplog.at_level(logging.WARNING, "foveate"), bench.manager() as manager:
        bench.ticks(manager, 8, wait=0.3)
        low = manager.index
        assert low > 0
        assert asked == [low]  # planes are given back after the fall
        bench.ticks(manager, 62, wait=0.0)
        bench.ticks(manager, 1)
        assert manager.index == low
        assert fv.current_map(bench.model) == manager.frontier[low]
        assert asked[1] == low - 1
        assert "the disk is gone" in caplog.text
        fails[0] = False
        bench.ticks(manager, 20 * 30)
        assert manager.index == 0


def test_a_limit_that_nothing_watches_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    sensors = {"power": lambda: "there is no meter", "queue_wait": lambda: 0.0}
    limits = fv.Limits(power=45, queue_wait=1)
    with caplog.at_level(logging.WARNING, "foveate"), bench.manager(limits, sensors=sensors) as manager:
        bench.ticks(manager, 50)
        assert manager.index == 0
    assert [r.getMessage() for r in caplog.records] == ["power is limited and cannot be watched: there is no meter"]


def test_memory_above_its_limit_gates_admission_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    taken = [2e9]
    limits, sensors = fv.Limits(memory="1GiB"), {"memory": lambda: taken[0]}
    with caplog.at_level(logging.WARNING, "foveate"), bench.manager(limits, sensors=sensors) as manager:
        bench.ticks(manager, 5)
        assert not manager.admits
        assert manager.index == 0
        taken[0] = 5e8
        bench.ticks(manager, 5)
        assert manager.admits
    assert caplog.text.count("no new work is to be admitted") == 1


def test_passes_are_charged_to_the_quality_budget() -> None:
    bench = Bench()
    profile = bench.profile
    costs = Costs(kl=(0.0, 0.5))
    bench.options |= {"costs": costs, "policy": Policy(burst=10.0)}
    chain = fv.Frontier((profile.uniform(8), profile.uniform(2)))
    with bench.manager(fv.Limits(queue_wait=0.2, quality=0.1), frontier=chain) as manager:
        bench.ticks(manager, 10, wait=1.0)
        assert manager.index == 1
        for _ in range(4):
            bench.model(rows()[0])
            bench.ticks(manager, 1)
        assert manager.index == 0
        assert manager.expected_kl <= 0.5
        assert manager.moves[-1].decision.reason == "the quality budget is spent"


def test_a_background_thread_decides_by_itself() -> None:
    model, _ = quantized_mlp()
    moved = threading.Event()
    options = ManagerOptions(status=False, tick=0.01, policy=Policy(patience=0.0))
    sensors = {"queue_wait": lambda: 1.0}
    with RuntimeManager(model, limits=fv.Limits(queue_wait=0.1), sensors=sensors, options=options) as manager:
        for _ in range(1000):
            model(rows()[0])
            if manager.index == len(manager.frontier) - 1:
                moved.set()
                break
            moved.wait(0.01)
        assert moved.is_set()
        assert manager.expected_kl >= 0


def test_an_error_of_the_thread_is_raised_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized_mlp()
    failed = threading.Event()

    def passes(self: ModelLevels) -> tuple[float, float | None]:
        failed.set()
        raise ZeroDivisionError("nothing to divide")

    monkeypatch.setattr(ModelLevels, "passes", passes)
    manager = RuntimeManager(model, limits=fv.Limits(quality=1.0), options=ManagerOptions(status=False, tick=0.001))
    with pytest.raises(fv.FoveateError, match="stopped deciding: nothing to divide"), manager:
        assert failed.wait(20)


def test_a_map_that_somebody_applied_meanwhile_stays() -> None:
    bench = Bench()
    with bench.manager():
        mine = bench.profile.uniform(3)
        fv.apply(bench.model, mine)
    assert fv.current_map(bench.model) is mine


def test_a_model_that_was_loaded_with_fewer_planes_starts_there(saved: tuple[Path, Any, fv.Profile]) -> None:
    folder = saved[0]
    with torch.device("meta"):
        skeleton = mlp()
    model = fv.load(folder, keep=4, model=skeleton)
    with RuntimeManager(
        model, limits=fv.Limits(quality=1.0), options=ManagerOptions(background=False, status=False)
    ) as manager:
        assert manager.frontier[0] == fv.current_map(model)
        assert len(manager.frontier) > 1
        for better, worse in zip(manager.frontier.maps, manager.frontier.maps[1:], strict=False):
            assert worse.bytes_read <= better.bytes_read


def test_a_status_file_can_be_found_while_the_manager_runs() -> None:
    bench = Bench(status=True)
    with bench.manager() as manager:
        bench.ticks(manager, 30, wait=1.0)
        found = find_status(status_folder())
        assert found["index"] == manager.index > 0
        assert found["readings"]["queue_wait"] == {"value": 1.0, "reason": ""}
        plan = manager.frontier[manager.index]
        assert found["levels"] == {s.name: [plan.mean_level(s), s.weights] for s in bench.profile.weight_sites()}
        assert found["moves"][-1]["index"] == manager.index
    with pytest.raises(fv.FoveateError, match="no process of this user runs a RuntimeManager"):
        find_status(status_folder())


Bad = Callable[[Bench], object]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda b: b.manager(sensors={}), "queue_wait is limited and nobody reads it"),
        (lambda b: b.manager(sensors={"queue_wait": lambda: 0.0, "power": lambda: 0.0}), "power, which have no limit"),
        (lambda b: b.manager("200ms"), "are not fv.Limits"),
        (lambda b: b.manager().step(), "does not run"),
        (lambda b: ManagerOptions(tick=0), "tick"),
        (
            lambda b: RuntimeManager(
                b.model, limits=fv.Limits(quality=1.0), options=ManagerOptions(costs=Costs(kl=(0.0,)))
            ),
            "the costs are of 1 indices",
        ),
        (lambda b: RuntimeManager(mlp(), limits=fv.Limits(quality=1.0)), "not quantized"),
    ],
)
def test_what_is_refused(make: Bad, says: str) -> None:
    with pytest.raises(fv.FoveateError, match=says):
        make(Bench())
