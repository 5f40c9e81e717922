"""The routes of OpenAI: what is answered, streamed, and refused."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import foveate as fv
from served import Served


def _logits(served: Served, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = served.engine.model(input_ids=ids, use_cache=False).logits
    return logits


def _greedy(served: Served, prompt: str, count: int) -> str:
    tokenizer = served.engine.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    for _ in range(count):
        ids = torch.cat([ids, _logits(served, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return str(tokenizer.decode(ids[0, -count:]))


def test_a_completion_is_the_greedy_one(served: Served) -> None:
    reply = served.complete()
    assert reply.status == 200, reply.body
    answer = reply.json
    assert answer["choices"][0]["text"] == _greedy(served, "def f(x):", 8)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_many_at_once_have_the_answers_that_they_have_alone(served: Served) -> None:
    prompts = [f"def f{i}(x):\n    return {'x' * i}" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda prompt: served.complete(prompt=prompt), prompts))
    assert [r.json["choices"][0]["text"] for r in replies] == [_greedy(served, prompt, 8) for prompt in prompts]


def test_a_chat_is_rendered_by_the_template_of_the_model(served: Served) -> None:
    reply = served.chat()
    assert reply.status == 200, reply.body
    message = reply.json["choices"][0]["message"]
    assert message["content"] == _greedy(served, "user: hi\nassistant:", 8)
    assert message["role"] == "assistant"


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_says_what_the_whole_answer_says(served: Served, chat: bool) -> None:
    ask = served.chat if chat else served.complete
    whole = ask().json
    events = ask(stream=True, stream_options={"include_usage": True}).events
    *parts, usage = events
    if chat:
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in parts)
        assert text == whole["choices"][0]["message"]["content"]
        assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    else:
        assert "".join(event["choices"][0]["text"] for event in parts) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in parts] == [None] * (len(parts) - 1) + ["length"]
    assert usage["usage"] == whole["usage"]
    assert usage["choices"] == []
    assert parts[-1]["precision"] == whole["precision"]


def test_an_answer_ends_where_a_stop_string_begins(served: Served) -> None:
    text = served.complete(max_tokens=12).json["choices"][0]["text"]
    stop = text[5:7]
    cut = text[: text.index(stop)]
    answer = served.complete(max_tokens=12, stop=[stop, "never there"]).json
    assert answer["choices"][0]["text"] == cut
    assert answer["choices"][0]["finish_reason"] == "stop"
    streamed = served.complete(max_tokens=12, stop=stop, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in streamed) == cut
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_model(served: Served) -> None:
    content = served.chat(logprobs=True, top_logprobs=3, max_tokens=2).json["choices"][0]["logprobs"]["content"]
    ids = torch.tensor([served.engine.tokenizer("user: hi\nassistant:")["input_ids"]])
    expected = _logits(served, ids)[0, -1].log_softmax(-1).topk(3)
    found = [one["logprob"] for one in content[0]["top_logprobs"]]
    assert found == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert content[0]["logprob"] == pytest.approx(found[0], abs=1e-4)
    legacy = served.complete(logprobs=2, max_tokens=3).json["choices"][0]["logprobs"]
    assert len(legacy["tokens"]) == len(legacy["token_logprobs"]) == len(legacy["top_logprobs"]) == 3
    assert all(math.isfinite(value) and value <= 0 for value in legacy["token_logprobs"])


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(served: Served) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    alone = served.complete(**fields).json["choices"][0]["text"]
    with ThreadPoolExecutor(6) as pool:
        beside = [pool.submit(served.complete, temperature=1.5, max_tokens=20) for _ in range(3)]
        again = [pool.submit(served.complete, **fields) for _ in range(2)]
        assert all(one.result().status == 200 for one in beside)
        assert {one.result().json["choices"][0]["text"] for one in again} == {alone}
    assert served.complete(**{**fields, "seed": 8}).json["choices"][0]["text"] != alone


def test_a_bias_decides(served: Served) -> None:
    token = served.engine.tokenizer("!")["input_ids"][0]
    answer = served.complete(logit_bias={str(token): 100}, max_tokens=3).json
    assert answer["choices"][0]["text"] == "!!!"
    answer = served.complete(logit_bias={str(token): 50}, frequency_penalty=2.0, presence_penalty=2.0, max_tokens=3)
    assert answer.json["choices"][0]["text"] == "!!!"


def test_an_answer_ends_at_a_token_that_ends_it_unless_told_otherwise(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = served.engine.tokenizer("!")["input_ids"][0]
    monkeypatch.setattr(served.engine, "_ends", frozenset([token]))
    fields: dict[str, Any] = {"logit_bias": {str(token): 100}, "max_tokens": 3}
    ended = served.complete(**fields).json["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    whole = served.complete(**fields, ignore_eos=True).json["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == ("!!!", "length")


def test_an_echo_and_token_ids(served: Served) -> None:
    plain = served.complete().json["choices"][0]["text"]
    assert served.complete(echo=True).json["choices"][0]["text"] == "def f(x):" + plain
    ids = served.engine.tokenizer("def f(x):")["input_ids"]
    assert served.complete(prompt=ids).json["choices"][0]["text"] == plain
    assert served.complete(prompt=["def f(x):"]).json["choices"][0]["text"] == plain
    assert served.complete(prompt=[ids]).json["choices"][0]["text"] == plain


@pytest.mark.parametrize("tier", [None, 2])
def test_an_echo_has_the_log_probabilities_of_the_prompt(served: Served, tier: int | None) -> None:
    fields = {} if tier is None else {"precision": {"tier": tier}}
    answer = served.complete(echo=True, logprobs=1, max_tokens=1, **fields).json["choices"][0]
    found = answer["logprobs"]
    ids = torch.tensor([served.engine.tokenizer("def f(x):")["input_ids"]])
    chain = served.engine.control.frontier
    model = copy.deepcopy(served.engine.model)
    fv.apply(model, chain[tier or 0])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
    assert len(found["tokens"]) == len(found["text_offset"]) == ids.shape[1] + 1
    assert answer["text"].startswith("".join(found["tokens"][:-1]))
    greedy = logits.argmax(-1) == ids[0, 1:]
    likeliest = [max(one.values()) for one in found["top_logprobs"][1:-1]]
    assert [a == b for a, b in zip(found["token_logprobs"][1:-1], likeliest, strict=True)] == greedy.tolist()


def test_a_long_prompt_is_not_echoed_with_log_probabilities(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.serve.engine.engine.MOST_ECHOED", 4)
    assert served.complete(echo=True, logprobs=1).status == 400
    assert served.complete(echo=True).status == 200


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"best_of": 3}, 400, "best_of"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"guided_json": {}}, 400, "guided_json"),
        ({"echo": True, "logprobs": 1, "stream": True}, 400, "stream"),
        ({"prompt": [[1, 2], [3]]}, 400, "prompt"),
        ({"prompt": [[-1]]}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": [999999]}, 400, "prompt"),
        ({"prompt": ""}, 400, None),
        ({"prompt": "x" * 400}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "max_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"logprobs": 99}, 400, "logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"precision": "high"}, 400, "precision"),
        ({"precision": {"tier": 99}}, 400, "precision.tier"),
        ({"precision": {"tier": -1}}, 400, "precision.tier"),
        ({"precision": {"tier": "none such"}}, 400, "precision.tier"),
        ({"precision": {"floor": "31"}}, 400, "precision.floor"),
        ({"precision": {"floor": 1, "tier": 2}}, 400, "precision"),
    ],
)
def test_what_is_not_served_is_refused_and_named(
    served: Served, fields: dict[str, Any], status: int, named: str | None
) -> None:
    reply = served.complete(**fields)
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert error["param"] == named
    assert error["message"]
    assert error["code"] == status


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
        {"tools": [{"type": "function"}]},
        {"top_logprobs": 2},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"reasoning_effort": "high"},
    ],
)
def test_chats_that_are_not_served_are_refused(served: Served, fields: dict[str, Any]) -> None:
    reply = served.chat(**fields)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_values_that_ask_for_nothing_pass(served: Served) -> None:
    nothing = {"n": 1, "user": "me", "best_of": 1, "stop": None, "logit_bias": None, "suffix": ""}
    assert served.complete(**nothing).status == 200
    assert served.chat(response_format={"type": "text"}, tools=[], store=False, tool_choice="none").status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN', b"null"])
def test_malformed_bodies_are_refused(served: Served, body: bytes) -> None:
    reply = served.ask("POST", "/v1/completions", body)
    assert reply.status == 400
    assert "JSON" in reply.json["error"]["message"]


def test_a_body_beyond_the_limit_is_refused(served: Served) -> None:
    assert served.complete(prompt="x" * 30_000).status == 413


def test_routes_that_would_change_the_model_are_gone(served: Served) -> None:
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions"):
        assert served.ask("POST", path, {"model": "gpt2", "input": "x"}).status == 404
    listed = served.ask("GET", "/v1/models").json["data"]
    assert [(one["id"], one["max_model_len"]) for one in listed] == [("tiny", 256)]
    assert served.ask("GET", "/health").status == served.ask("GET", "/ready").status == 200
