"""A client that we did not write: the `openai` package sees chats, completions, streams and errors as it expects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from served import Served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    with made:
        yield made


def _message() -> Any:
    return [{"role": "user", "content": "hi"}]


def test_chats_and_completions(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=_message(), max_tokens=5, temperature=0, logprobs=True)
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 5
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or ()) == 5
    plain = client.completions.create(model="tiny", prompt="def f(x):", max_tokens=5, temperature=0, logprobs=2)
    assert plain.choices[0].finish_reason == "length"
    assert len(plain.choices[0].logprobs.tokens or ()) == 5  # type: ignore[union-attr]
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_streams(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=_message(), max_tokens=6, temperature=0)
    text, usage = "", None
    with client.chat.completions.create(
        model="tiny", messages=_message(), max_tokens=6, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        for chunk in stream:
            usage = chunk.usage or usage
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_precision_goes_there_and_back(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=3, temperature=0, extra_body={"precision": {"tier": 1}}
    )
    assert raw.headers["x-foveate-tier"] == "1"
    answer: Any = raw.parse()
    assert answer.precision["worst"] == 1


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n is not served"):
        client.completions.create(model="tiny", prompt="x", n=2)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="other", prompt="x")
