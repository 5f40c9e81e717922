"""Faults: clients that go away, too many of them, keys, and signals to end. Nothing is lost, and nothing hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import foveate as fv
from foveate.cli.serve import check_free
from foveate.cli.shared.data import price_batches
from foveate.errors import BudgetError, DataError
from foveate.serve.options import ServeOptions, ServerLimits
from served import Served, serving


def _until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(served: Served, stream: bool) -> None:
    body = b'{"prompt": "x", "max_tokens": 200, "temperature": 1, "stream": %s}' % str(stream).lower().encode()
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b"200 OK" in client.recv(64)
        _until(lambda: served.engine.jobs.counts()[0] == 1)
    _until(lambda: served.engine.jobs.counts() == (0, 0, 0))
    _until(lambda: served.engine.cache_usage == 0)
    assert served.complete().status == 200


def test_a_hundred_clients_at_once_all_get_their_answer(served: Served) -> None:
    expected = served.complete(max_tokens=2).json["choices"][0]["text"]
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda _: served.complete(max_tokens=2), range(100)))
    assert {(reply.status, reply.json["choices"][0]["text"]) for reply in replies} == {(200, expected)}


def test_what_does_not_fit_into_the_queue_is_told_when_to_come_again(model: Any, tokenizer: Any) -> None:
    limits = ServerLimits(batch=1, batch_tokens=16, cache_tokens=512, waiting=2)
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None, limits=limits)) as one:
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: one.complete(max_tokens=12), range(12)))
        refused = [reply for reply in replies if reply.status == 429]
        assert {reply.status for reply in replies} == {200, 429}
        assert all(1 <= int(reply.headers["retry-after"]) <= 120 for reply in refused)
        assert refused[0].json["error"]["type"] == "rate_limit_error"
        assert f"foveate:requests_refused_total {len(refused)}" in one.ask("GET", "/metrics").body.decode()


def test_a_key_is_asked_for(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None, api_key="secret")) as one:
        assert one.complete().status == 401
        assert one.ask("GET", "/v1/precision").status == 401
        assert one.ask("GET", "/v1/models", headers={"authorization": "Bearer wrong"}).status == 401
        assert one.ask("GET", "/v1/models", headers={"authorization": "Bearer secret"}).status == 200
        assert {one.ask("GET", path).status for path in ("/health", "/ready", "/metrics")} == {200}


def test_an_engine_that_fails_says_so_and_answers_503(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None)) as one:

        def broken(*_: Any) -> bool:
            raise RuntimeError("the model is broken")

        one.engine.begin = broken  # type: ignore[method-assign]
        reply = one.complete()
        assert (reply.status, "broken" in reply.json["error"]["message"]) == (500, True)
        assert one.ask("GET", "/health").status == one.ask("GET", "/ready").status == 503
        assert one.complete().status == 503


def test_on_a_signal_answers_that_are_on_their_way_are_finished(model: Any, tokenizer: Any) -> None:
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None)) as one:
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(one.complete, max_tokens=150, stream=n % 2 == 0) for n in range(6)]
            _until(lambda: one.engine.jobs.counts()[0] + one.engine.jobs.counts()[1] == 6)
            one.server.handle_exit(15, None)
            replies = [answer.result() for answer in answers]
        assert {reply.status for reply in replies} == {200}
        assert all(reply.events[-1]["choices"][0]["finish_reason"] == "length" for reply in replies[::2])
        assert all(reply.json["usage"]["completion_tokens"] == 150 for reply in replies[1::2])
        one.thread.join(60)
        assert not one.thread.is_alive()


def test_the_command_serves_a_folder_until_it_is_told_to_end(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    fv.save(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    command = [sys.executable, "-m", "foveate", "serve", str(tmp_path / "out"), "--port", "0", "--name", "tiny"]
    with subprocess.Popen([*command, "--limits", "none"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = ""
        while "serving tiny at" not in line:
            line = process.stderr.readline()
            assert line, "the server ended before it listened"
        one = Served(None, int(line.rstrip().rstrip("/").rpartition(":")[2]), None, None)  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(one.complete, max_tokens=60)
            time.sleep(0.3)
            process.terminate()
            try:
                reply = answer.result()
            except ConnectionError:  # the signal came before the connection
                reply = None
        assert reply is None or reply.json["usage"]["completion_tokens"] == 60
        assert process.wait(60) == 0


@pytest.mark.parametrize("bad", [{"batch": 0}, {"body": "1"}, {"batch": 8, "batch_tokens": 4}, {"waiting": True}])
def test_limits_check_themselves(bad: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        ServerLimits(**bad)


def test_a_port_that_is_taken_and_a_text_that_is_short_are_said_before_the_work(
    served: Served, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"cannot listen at 127.0.0.1:{served.port}"):
        check_free("127.0.0.1", served.port)
    check_free("127.0.0.1", 0)
    fv.save(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    (tmp_path / "short.txt").write_text("few", encoding="utf-8")
    with pytest.raises(DataError, match=r"short.txt has 3 tokens, too few to find the price of a byte on"):
        price_batches(tmp_path / "short.txt", tmp_path / "out")
    (tmp_path / "long.txt").write_text("def f(x):\n    return x\n" * 100, encoding="utf-8")
    made = price_batches(tmp_path / "long.txt", tmp_path / "out")
    assert {tuple(one["input_ids"].shape) for one in made} <= {(8, 128), (made[-1]["input_ids"].shape[0], 128)}
