"""A tiny Llama over bytes, and servers of it in threads of this process, for the tests of the room serve."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import uvicorn

import foveate as fv
from foveate.serve.engine.engine import Engine
from foveate.serve.options import ServeOptions
from foveate.serve.run import DrainingServer, made_engine
from foveate.serve.web.app import build_app
from tiny import llama, tokens

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


def byte_llama() -> Any:
    """A quantized Llama of 256 words."""
    model = llama(vocab_size=256, max_position_embeddings=256, initializer_range=0.2, eos_token_id=None)
    fv.quantize(model, tokens(4, 24, vocabulary=256), progress=False)
    return model


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON objects of server-sent events, without the last, which is no JSON."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@dataclass(frozen=True)
class Served:
    engine: Engine
    port: int
    server: DrainingServer
    thread: threading.Thread

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json", "connection": "close", **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        response = self.open(method, path, body, headers)
        read = response.read()
        response.close()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, read)

    def complete(self, **fields: Any) -> Reply:
        body = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0, **fields}
        return self.ask("POST", "/v1/completions", {name: v for name, v in body.items() if v is not ...})

    def chat(self, **fields: Any) -> Reply:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, **fields}
        return self.ask("POST", "/v1/chat/completions", body)


@contextmanager
def serving(model: Any, tokenizer: Any, options: ServeOptions) -> Iterator[Served]:
    """A server in a thread; it drains at the end."""
    engine = made_engine(model, tokenizer, options)
    engine.start()
    server = DrainingServer(uvicorn.Config(build_app(engine), port=0, log_level="warning", access_log=False))
    server.engine = engine
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield Served(engine, server.servers[0].sockets[0].getsockname()[1], server, thread)
    finally:
        server.should_exit = engine.draining = True
        thread.join(30)
        engine.stop(10)
