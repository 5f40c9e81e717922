"""All deciders of a server at once: a limit of memory, the manager, inputs that choose, and importance."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.errors import BudgetError
from foveate.importance import Caution, Shadow, TrackingOptions
from foveate.kernels.backends.table import ensure_loaded
from foveate.runtime import Limits, ManagerOptions, Policy
from foveate.serve.engine.deciders import who_decides
from foveate.serve.options import ServeOptions, ServerLimits
from served import Served, serving
from tiny import quick_tracking, tokens

pytestmark = pytest.mark.skipif(ensure_loaded().isa is None, reason="planes on disk need compiled kernels")
_LIMITS = ServerLimits(batch=4, batch_tokens=64, cache_tokens=2048)
#: Decides after a few requests, and takes every move that is predicted to gain.
_QUICK = quick_tracking(warm_up=0, caution=Caution(margin=0.0), shadow=Shadow(calls=2, tokens=24), by_hand=True)


def mixtral() -> Any:
    """A quantized mixture of four experts over 256 words."""
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
            initializer_range=0.2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = MixtralForCausalLM(config).eval()
    fv.quantize(model, tokens(8, 24, vocabulary=256), progress=False)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "out"
    fv.save(mixtral(), path)
    return path


@pytest.fixture(scope="module")
def everything(folder: Path, tokenizer: Any) -> Iterator[Served]:
    """A server of a mixture of experts with every decider that there is."""
    whole = sum(weight.value.nbytes() for weight in fv.nn.registry.registry_of(fv.load(folder)).weights.values())
    model = fv.load(folder, memory=int(1.5 * whole))
    options = ServeOptions(
        name="mixture",
        bend=Limits(queue_wait=0.02),
        manager=ManagerOptions(
            background=False, tick=0.01, policy=Policy(patience=0.0, dwell_down=0.01, dwell_up=0.05), status=False
        ),
        limits=_LIMITS,
        points=32,
        adapt_on=tokens(4, 24, vocabulary=256, seed=3),
        follow=_QUICK,
    )
    with serving(model, tokenizer, options) as one:
        yield one
    state = fv.state_of(model)
    assert not {**state.indices, **state.floors, **state.requests, **state.adaptations, **state.raises}
    assert set(state.frontiers) == {"memory"}


def _load(one: Served, count: int, **fields: Any) -> list[Any]:
    texts = ("z" * 40, "zzzzzzzz", "z" * 24, "zz")  # one word, so few inputs and experts have all of the importance
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda i: one.complete(prompt=texts[i % 4], max_tokens=12, **fields), range(count)))


def test_all_deciders_at_once_lose_and_tear_nothing(everything: Served) -> None:
    control = everything.engine.control
    replies = _load(everything, 48)
    assert [reply.status for reply in replies] == [200] * 48
    assert all(reply.json["usage"]["completion_tokens"] == 12 for reply in replies)
    assert max(reply.json["precision"]["worst"] for reply in replies) > 0
    for _ in range(20):  # inputs have chosen nothing yet where levels have just changed
        status = everything.ask("GET", "/v1/precision").json
        if status["chosen_bits"] is not None:
            break
        everything.complete(prompt="zz", max_tokens=1)
    deciders = {one["by"].partition(" ")[0] for one in status["deciders"]}
    assert {"track_importance", "adapt_to_input", "memory"} <= deciders
    assert status["importance"]["tokens"] > 100
    assert status["importance"]["moves"] + status["importance"]["refused"] > 0
    assert control.bits[-1] < status["chosen_bits"] < control.bits[0] + 1e-6
    said = {one.by for one in control.decisions}
    assert {"runtime", "importance"} <= said
    text = everything.ask("GET", "/metrics").body.decode()
    assert re.search(r"^foveate:importance_tokens [1-9]", text, re.MULTILINE)
    assert re.search(r"^foveate:chosen_bits [1-9]", text, re.MULTILINE)
    assert re.search(r"^foveate:planes_resident_bytes [1-9]", text, re.MULTILINE)


def test_memory_is_given_back_and_comes_again_while_answers_go_on(everything: Served) -> None:
    control = everything.engine.control
    before = control.resident_bytes
    assert before is not None
    limit = everything.ask("GET", "/v1/precision").json["deciders"][-1]["what"]
    assert "in memory of at most" in limit
    report = fv.memory_report(everything.engine.model)
    less = report.fixed + report.floor + (report.resident - report.floor) // 4
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(_load, everything, 12, precision={"tier": 0})
        assert everything.ask("POST", "/v1/precision", {"memory": less}).status == 200
        assert {reply.status for reply in going.result()} == {200}
    after = control.resident_bytes
    assert after is not None
    assert after < before
    low = everything.complete(precision={"tier": 0}).json["precision"]["bits"]
    assert low < control.bits[0] - 0.5
    assert any("of memory" in one.reason for one in control.decisions)
    assert everything.ask("POST", "/v1/precision", {"memory": report.limit}).status == 200
    until, bits = time.monotonic() + 60, low
    while bits != round(control.bits[0], 4) and time.monotonic() < until:
        bits = everything.complete(precision={"tier": 0}, max_tokens=2).json["precision"]["bits"]
    assert bits == round(control.bits[0], 4)
    assert everything.ask("GET", "/v1/precision").json["frontier"][0]["bits"] == control.bits[0]


@pytest.mark.parametrize("memory", ["much", "1KiB", True, None, -1])
def test_memory_that_is_no_size_or_too_little_is_refused(everything: Served, memory: Any) -> None:
    assert everything.ask("POST", "/v1/precision", {"memory": memory}).status == 400


def test_a_model_without_planes_on_disk_has_no_memory_to_move(served: Served) -> None:
    reply = served.ask("POST", "/v1/precision", {"memory": "1GiB"})
    assert reply.status == 400
    assert "all planes of this model are in memory" in reply.json["error"]["message"]


def test_a_floor_holds_whoever_else_decides(everything: Served) -> None:
    control = everything.engine.control
    floor = len(control.frontier) // 3
    assert everything.ask("POST", "/v1/precision", {"hold": True}).status == 200
    held = everything.ask("GET", "/v1/precision").json
    assert {"by": "operator", "what": f"holds index {held['index']}"} in held["deciders"]
    assert everything.ask("POST", "/v1/precision", {"hold": False}).status == 200
    replies = _load(everything, 24, precision={"floor": floor})
    assert max(reply.json["precision"]["worst"] for reply in replies) <= floor
    assert everything.ask("POST", "/v1/precision", {"floor": 2}).status == 200
    assert max(reply.json["precision"]["worst"] for reply in _load(everything, 24)) <= 2
    assert {"by": "operator", "what": "a floor: no index beyond 2"} in who_decides(everything.engine.model)
    assert everything.ask("POST", "/v1/precision", {"floor": None}).status == 200


def test_as_many_tiers_as_clients_like_do_not_end_the_engine(everything: Served) -> None:
    with ThreadPoolExecutor(12) as pool:
        asked = [{"tier": n} for n in range(2, 10)] + [{"floor": n} for n in range(4, 8)]
        replies = list(pool.map(lambda wish: everything.complete(precision=wish, max_tokens=24), asked * 3))
    assert {reply.status for reply in replies} == {200}
    for wish, reply in zip(asked * 3, replies, strict=True):
        got = reply.json["precision"]
        assert got["worst"] == got["best"] == wish["tier"] if "tier" in wish else got["worst"] <= wish["floor"]
    with ThreadPoolExecutor(12) as pool:
        echoes = list(pool.map(lambda n: everything.complete(precision={"tier": n}, echo=True, logprobs=1), range(14)))
    assert {reply.status for reply in echoes} == {200}


def test_a_floor_that_the_frontier_no_longer_meets_is_read_at_the_best(everything: Served) -> None:
    control = everything.engine.control
    best = control.bits[0]
    unmet = fv.Request(floor=fv.Floor(bits=best + 0.4))
    assert everything.engine.ask(lambda: control.pass_indices([unmet, None], [1, 1])[0]).result(30)[0] == 0
    assert everything.complete().status == 200


def test_inputs_alone_choose_around_the_index(folder: Path, tokenizer: Any) -> None:
    model = fv.load(folder)
    batches = tokens(4, 24, vocabulary=256, seed=3)
    options = ServeOptions(name="mixture", bend=None, limits=_LIMITS, points=32, adapt_on=batches)
    with serving(model, tokenizer, options) as one:
        control = one.engine.control
        middle = len(control.frontier) // 2
        assert one.ask("POST", "/v1/precision", {"index": middle}).status == 200
        _load(one, 8)
        chosen = one.ask("GET", "/v1/precision").json["chosen_bits"]
        low, high = control.deciders.adapted.adaptation.around(middle, len(control.frontier) - 1)  # type: ignore[union-attr]
        assert control.bits[low] <= chosen <= control.bits[high]
        fixed = one.complete(precision={"tier": middle})
    fv.apply(model, fv.frontier(fv.profile_of(model), 32)[middle])
    with torch.no_grad():
        ids = torch.tensor([tokenizer("def f(x):")["input_ids"]])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert fixed.json["choices"][0]["text"] == tokenizer.decode(expected)


def test_importance_that_fails_leaves_the_answers_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no room for a chain")

    monkeypatch.setattr("foveate.importance.tracker.ImportanceTracker._decide", fails)
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None, limits=_LIMITS, follow=_QUICK)) as one:
        replies = _load(one, 16)
        assert {reply.status for reply in replies} == {200}
        status = one.ask("GET", "/v1/precision").json
        assert "no room for a chain" in status["importance"]
        assert not any(by["by"].startswith("track_importance") for by in status["deciders"])
        assert one.complete(precision={"tier": 2}).status == 200


def test_a_server_decides_between_its_steps_alone() -> None:
    with pytest.raises(BudgetError, match="by_hand"):
        ServeOptions(name="tiny", follow=TrackingOptions())


def test_inputs_cannot_choose_on_a_frontier_of_two_maps(model: Any, tokenizer: Any) -> None:
    options = ServeOptions(name="tiny", bend=None, points=2, adapt_on=tokens(2, 24, vocabulary=256))
    with pytest.raises(BudgetError, match="has 2"), serving(model, tokenizer, options):
        pass
    assert "server" not in fv.state_of(model).frontiers
