"""Precision of single requests, of the operator, and of the manager: what is read is what the answer says."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.precision.state import Floor, Request
from foveate.runtime import Limits, ManagerOptions, Policy
from foveate.serve.calls.refused import RefusedRequest
from foveate.serve.calls.wish import Given, Wish
from foveate.serve.options import ServeOptions, ServerLimits
from served import Served, serving

PROMPT = "def f(x):"


def _reloaded(served: Served, index: int, prompt: str, count: int) -> str:
    """The greedy answer of the model as it is when that map alone is applied."""
    model, tokenizer = served.engine.model, served.engine.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad(), fv.row_precision(model, [Request(tier=index)]):
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return str(tokenizer.decode(ids[0, -count:]))


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        one: Served = request.getfixturevalue("served")
        assert one.ask("POST", "/v1/precision", {"hold": False, "floor": None}).status == 200


def test_a_fixed_tier_is_the_model_at_that_tier(served: Served) -> None:
    chain = served.engine.control.frontier
    last = len(chain) - 1
    expected = {index: _reloaded(served, index, PROMPT, 8) for index in (0, last // 2, last)}
    assert len(set(expected.values())) > 1, "the tiers of this model answer alike: the test would prove nothing"
    for index, text in expected.items():
        reply = served.complete(precision={"tier": index})
        assert reply.json["choices"][0]["text"] == text
        got = reply.json["precision"]
        assert got["bits"] == pytest.approx(chain.bits(index), abs=1e-3)
        assert got == {
            "tier": index, "best": index, "worst": index, "bits": got["bits"], "min_bits": got["bits"], "switches": 0
        }  # fmt: skip
        assert reply.headers["x-foveate-tier"] == str(index)
        assert float(reply.headers["x-foveate-bits"]) == got["bits"]
        assert reply.headers["x-foveate-switches"] == "0"


def test_rows_of_one_batch_differ_also_beside_prompts_that_are_read(served: Served) -> None:
    last = len(served.engine.control.frontier) - 1
    calls = [(f"{PROMPT}{'y' * (7 * n)}", n % 4 * last // 3) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda c: served.complete(prompt=c[0], precision={"tier": c[1]}), calls))
    for (prompt, index), reply in zip(calls, replies, strict=True):
        assert reply.json["choices"][0]["text"] == _reloaded(served, index, prompt, 8)
        assert reply.json["precision"]["best"] == reply.json["precision"]["worst"] == index


def test_more_wishes_than_a_step_can_hold_wait_their_turn(served: Served) -> None:
    count = len(served.engine.control.frontier)
    assert count > 9
    with ThreadPoolExecutor(count) as pool:
        replies = list(pool.map(lambda i: served.complete(precision={"tier": i}, max_tokens=4), range(count)))
    assert [reply.json["precision"]["worst"] for reply in replies] == list(range(count))


def test_the_operator_holds_an_index_and_floors_and_tiers_keep_theirs(served: Served) -> None:
    chain = served.engine.control.frontier
    last = len(chain) - 1
    status = served.ask("POST", "/v1/precision", {"index": last}).json
    assert (status["index"], status["held"]) == (last, True)
    assert served.complete().json["precision"]["worst"] == last
    assert served.complete(precision={"floor": 2}).json["precision"]["worst"] == 2
    assert served.complete(precision={"tier": 1}).json["precision"]["best"] == 1
    bits = f"{chain.bits(3):.3f}"
    assert served.complete(precision={"floor": bits}).json["precision"]["worst"] == 3
    assert served.ask("POST", "/v1/precision", {"floor": 4}).json["index"] == 4
    assert served.complete().json["precision"]["worst"] == 4
    status = served.ask("POST", "/v1/precision", {"floor": None, "hold": False}).json
    assert (status["index"], status["held"], status["floor"]) == (0, False, last)
    decided = [d.index for d in served.engine.control.decisions]
    assert decided[-1] == 0
    assert last in decided[: decided.index(4)]


@pytest.mark.parametrize(
    "body",
    [{}, {"index": 99}, {"index": "none"}, {"hold": 1}, {"floor": "30"}, {"floor": -1}, {"levels": 3}, {"index": 1.5}],
)
def test_bad_changes_are_refused_and_change_nothing(served: Served, body: dict[str, Any]) -> None:
    before = served.ask("GET", "/v1/precision").json
    assert served.ask("POST", "/v1/precision", body).status == 400
    assert served.ask("GET", "/v1/precision").json == before


def test_an_index_that_there_is_not_is_called_by_its_name(served: Served) -> None:
    for body, name in (({"index": 200}, "index"), ({"floor": "99"}, "floor"), ({"index": -1}, "index")):
        error = served.ask("POST", "/v1/precision", body).json["error"]
        assert error["param"] == name
        assert "precision." not in error["message"]


def test_random_switches_under_load_change_no_token_at_a_fixed_tier(served: Served) -> None:
    control, engine = served.engine.control, served.engine
    last = len(control.frontier) - 1
    expected = _reloaded(served, 2, PROMPT, 24)
    chooses = random.Random(0)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(served.complete, precision={"tier": 2}, max_tokens=24) for _ in range(4)]
        moving = [pool.submit(served.complete, max_tokens=24) for _ in range(2)]
        switches = 0
        while not all(one.done() for one in (*answers, *moving)):
            engine.ask(lambda: control.hold(chooses.randint(0, last))).result(30)
            switches += 1
        assert {one.result().json["choices"][0]["text"] for one in answers} == {expected}
        assert {one.result().json["precision"]["switches"] for one in answers} == {0}
        assert max(one.result().json["precision"]["switches"] for one in moving) > 0
    assert switches > 10


def test_the_manager_bends_precision_under_load_and_brings_it_back(model: Any, tokenizer: Any) -> None:
    quick = Policy(patience=0.0, dwell_down=0.01, dwell_up=0.05)
    options = ServeOptions(
        name="tiny",
        bend=Limits(queue_wait=0.02),
        manager=ManagerOptions(background=False, tick=0.01, policy=quick, status=False),
        limits=ServerLimits(batch=2, batch_tokens=32, cache_tokens=1024),
    )
    with serving(model, tokenizer, options) as one:
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda _: one.complete(max_tokens=16), range(16)))
        assert [reply.status for reply in replies] == [200] * 16
        assert max(reply.json["precision"]["worst"] for reply in replies) > 0
        control = one.engine.control
        assert any(way == "down" and by == "runtime" for way, by in control.switches)
        until = time.monotonic() + 60
        while control.index and time.monotonic() < until:
            time.sleep(0.05)
        assert control.index == 0
        assert one.complete().json["precision"]["worst"] == 0
        assert any("queue_wait" in decision.reason for decision in control.decisions)
        text = one.ask("GET", "/metrics").body.decode()
        assert re.search(r'foveate:precision_switches_total\{[^}]*direction="down"[^}]*\} [1-9]', text)
    assert fv.state_of(model).indices.get("runtime") is None


def test_a_manager_that_fails_leaves_the_answers_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServeOptions(name="tiny", manager=ManagerOptions(background=False, status=False))
    with serving(model, tokenizer, options) as one:
        manager = one.engine.control.manager
        assert manager is not None

        def full() -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(manager, "step", full)
        assert one.complete().status == 200
        until = time.monotonic() + 30
        while not one.engine.control.fault and time.monotonic() < until:
            time.sleep(0.02)
        status = one.ask("GET", "/v1/precision").json
        assert "No space left" in status["manager"]["fault"]
        assert status["manager"]["decides"] is False
        assert one.complete().status == 200
        monkeypatch.undo()
        manager.close()


def test_wishes_and_reports() -> None:
    assert Wish.parse(None) == Wish.parse({"tier": "auto"}) == Wish.parse({"tier": None}) == Wish()
    assert Wish.parse({"tier": 2}).tier == 2
    with pytest.raises(RefusedRequest, match="not an object"):
        Wish.parse({"tier": 1, "speed": 2})
    given = Given()
    assert given.report(Wish())["bits"] is None
    for index, token in ((0, False), (1, True), (1, True), (0, True)):
        given.add(index, (8.0, 4.0)[index], token)
    assert given.report(Wish(floor=1)) == {
        "tier": "auto", "best": 0, "worst": 1, "bits": round(16 / 3, 4), "min_bits": 4.0, "switches": 2
    }  # fmt: skip


def test_the_state_says_the_index_of_a_request(model: Any) -> None:
    chain = fv.frontier(fv.profile_of(model), 6)
    state = fv.LevelState(frontiers={"user": chain}).with_index("a", 3).with_floor("b", Floor(index=4))
    assert state.index_of(None) == state.index_of(Request()) == 3
    assert state.index_of(Request(tier=5)) == 4
    assert state.index_of(Request(tier=1)) == 1
    assert state.index_of(Request(floor=Floor(index=2))) == 2
    assert state.index_of(Request(floor=Floor(index=5))) == 3
