"""The simulated server by hand and against its own copies; traces, policies, and the clairvoyant."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.bench import runtime
from foveate.bench.simulation.clairvoyant import Search, clairvoyant
from foveate.bench.simulation.costs import server_costs
from foveate.bench.simulation.policies import Controlled, run_controlled, run_static
from foveate.bench.simulation.server import Objective, Server, ServerCosts
from foveate.bench.simulation.traces import Trace, read_trace, traces_folder
from foveate.errors import DataError

#: Two indices and two slots; index 1 is twice as fast.
COSTS = ServerCosts(kl=(0.0, 0.5), iteration=((0.1, 0.19), (0.05, 0.1)), prompt_token=(0.01, 0.005))
OBJECTIVE = Objective()


def trace(*requests: tuple[float, int, int]) -> Trace:
    arrivals, prompts, generated = zip(*requests, strict=True)
    return Trace(arrivals=arrivals, prompts=prompts, generated=generated)


def busy(count: int = 150, gap: float = 0.8) -> Trace:
    """Requests that come at a steady rate, and more than twice as fast in the middle third."""
    now, found = 0.0, []
    for i in range(count):
        found.append((now, 1 + i % 7, 1 + i * 37 % 11))
        now += gap * (0.45 if count // 3 <= i < 2 * count // 3 else 1.0)
    return trace(*found)


def test_one_request_by_hand() -> None:
    server = Server(trace((0.0, 10, 3)), COSTS, OBJECTIVE)
    server.iterate(0)  # the prompt, and the first token
    assert (server.clock, server.tokens, server.active) == (pytest.approx(0.1), 1, 1)
    server.iterate(1)
    assert (server.clock, server.kl) == (pytest.approx(0.15), 0.5)
    server.iterate(0)
    assert server.done
    assert (server.met, server.missed, server.tokens) == (1, 0, 3)
    assert server.outcomes == {0: True}


def test_a_full_batch_makes_others_wait_in_their_order() -> None:
    server = Server(trace((0.0, 1, 20), (0.0, 1, 20), (0.0, 1, 1), (0.0, 1, 1)), COSTS, OBJECTIVE)
    server.iterate(0)
    assert server.active == 2
    assert server.backlog() == (2 * 19, 2)
    server.run_until(3.0, 0)
    assert server.queue_wait == pytest.approx(server.clock)
    server.run_until(1e9, 0)
    assert server.outcomes == {0: True, 1: True, 2: False, 3: False}
    assert (server.met, server.missed) == (2, 2)


def test_prompts_in_one_iteration_are_bounded_but_one_is_whole() -> None:
    server = Server(trace((0.0, 300, 5), (0.0, 1, 5)), COSTS, OBJECTIVE)
    server.iterate(0)
    assert server.active == 1
    assert server.clock == pytest.approx(3.0)


def test_a_slow_answer_misses_its_promise() -> None:
    slow = ServerCosts(kl=(0.0,), iteration=((0.3,),), prompt_token=(0.01,))
    assert run_static(trace((0.0, 1, 5)), slow, OBJECTIVE, 0).attainment == 0
    assert run_static(trace((0.0, 1, 1)), slow, OBJECTIVE, 0).attainment == 1


def test_an_idle_server_goes_to_the_next_arrival() -> None:
    outcome = run_static(trace((0.0, 1, 1), (100.0, 1, 1)), COSTS, OBJECTIVE, 0)
    assert outcome.hours * 3600 == pytest.approx(100.01)
    assert outcome.met == (True, True)


@given(st.integers(0, 40), st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_a_copy_goes_on_as_the_original_would(steps: int, indices: list[int]) -> None:
    server = Server(busy(40), COSTS, OBJECTIVE)
    for i in range(steps):
        if not server.done:
            server.iterate(i % 2)
    other = server.copy()
    for index in indices:
        for one in (other, server):
            if not one.done:
                one.iterate(index)
        assert (other.clock, other.kl, other.met, other.missed) == (server.clock, server.kl, server.met, server.missed)


def test_every_request_is_served_once_at_any_index() -> None:
    requests = busy()
    for index in (0, 1):
        outcome = run_static(requests, COSTS, OBJECTIVE, index)
        assert len(outcome.met) == len(requests)
        assert outcome.kl == pytest.approx(COSTS.kl[index])
        assert sum(outcome.met) / len(requests) == outcome.attainment


def test_the_controller_serves_nearly_as_many_as_the_lowest_at_less_kl() -> None:
    requests = busy(400, 0.8)
    best, lowest = (run_static(requests, COSTS, OBJECTIVE, index) for index in (0, 1))
    ours = run_controlled(requests, COSTS, OBJECTIVE, Controlled())
    assert best.attainment < ours.attainment <= lowest.attainment
    assert 0 < ours.kl < lowest.kl
    assert ours.switches
    assert len(ours.indices) >= ours.hours * 1800
    floored = run_controlled(requests, COSTS, OBJECTIVE, Controlled(floor=0))
    assert (floored.kl, floored.switches, floored.attainment) == (0, (), best.attainment)


def test_the_clairvoyant_beats_the_controller_that_it_starts_from() -> None:
    requests = busy(200, 0.8)
    ours = run_controlled(requests, COSTS, OBJECTIVE, Controlled())
    known = clairvoyant(requests, COSTS, OBJECTIVE, ours.indices, ours.attainment, Search(sweeps=4))
    assert known.attainment >= ours.attainment
    assert known.kl < ours.kl


def test_costs_are_between_those_that_were_measured() -> None:
    iterations = {2: {1: 0.01, 4: 0.04}, 8: {1: 0.03, 4: 0.02}}
    costs = server_costs([8.0, 5.0, 1.0], [0.0, 0.1, 0.2], iterations, {2: 0.001, 8: 0.003})
    assert costs.slots == 4
    assert costs.iteration[0] == (0.03,) * 4  # a greater batch never takes less time
    assert costs.iteration[2] == pytest.approx((0.01, 0.02, 0.03, 0.04))
    assert costs.prompt_token == pytest.approx((0.003, 0.002, 0.001))


def test_a_share_of_a_trace_keeps_its_times() -> None:
    whole = trace(*((float(i), 10 + i, 1) for i in range(101)))
    part = whole.at_rate(0.25)
    assert len(part) == 25
    assert all(b - a == 4 for a, b in zip(part.arrivals, part.arrivals[1:], strict=False))
    assert whole.at_rate(0.25, 0.5).prompts != part.prompts
    fast = whole.at_rate(2.0)
    assert len(fast) == 101
    assert fast.arrivals[-1] == pytest.approx(50)
    assert whole.with_prompts(0.01).prompts == (1,) * 101
    assert whole.part(100, 5).arrivals == (0.0,)


def test_a_trace_file_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05.5000000,7,3\n2023-11-16 18:17:03.9799600,4808,0\n"
    )
    found = read_trace(file)
    assert found.arrivals == (0.0, pytest.approx(1.52004))
    assert found.prompts == (4808, 7)
    assert found.generated == (1, 3)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is not a trace"):
        read_trace(file)


def test_without_data_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    with pytest.raises(DataError, match="set FOVEATE_DATA"):
        runtime.measure()


@pytest.mark.skipif("FOVEATE_DATA" not in os.environ, reason="FOVEATE_DATA is not set")
def test_figures_of_the_simulated_part(tmp_path: Path) -> None:
    costs = ServerCosts(
        kl=(0.001, 0.01, 0.3),
        iteration=tuple(tuple(speed * (0.02 + 0.004 * n) for n in range(16)) for speed in (1.0, 0.7, 0.5)),
        prompt_token=(0.003, 0.002, 0.0015),
    )
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(asdict(costs)))
    sizes = runtime.Sizes(costs_file=file, minutes=0, requests=120, search=Search(sweeps=2, horizon=3))
    found = runtime.measure(sizes)
    for name in ("conversation", "code"):
        assert 0 < found.figures[f"prompt_factor_{name}"] <= 1
        for rate in (0.7, 1, 1.3):
            assert 0 <= found.figures[f"slo_{name}_{rate:g}"] <= 1
            assert found.figures[f"switches_per_hour_{name}_{rate:g}"] >= 0
    assert found.figures["kl_over_clairvoyant_conversation_1.3"] > 0
    assert len(found.rounds) == 1 + 2 * 3
    scaled, _ = runtime.scaled(read_trace(traces_folder() / "AzureLLMInferenceTrace_conv.csv"), costs)
    share = costs.service(0, scaled.mean_prompt, 0) / costs.service(0, scaled.mean_prompt, scaled.mean_generated)
    assert share == pytest.approx(0.25, abs=0.01)
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"rounds": [dict(r) for r in found.rounds]}))
    assert runtime._costs_in(result) == costs
    file.write_text("{}")
    with pytest.raises(DataError, match="holds no costs"):
        runtime._costs_in(file)
