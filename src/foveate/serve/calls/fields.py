"""Call: what a request asks for, read from its JSON body. Every field is served as it is documented, or refused.

OpenAI's bodies have many fields. Those that are served are read here; those that change nothing at the value given
(`n` of 1) pass; every other is refused with status 400 and a sentence that names it, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeGuard

from foveate.serve.calls.refused import RefusedRequest
from foveate.serve.calls.wish import Wish

#: The most alternatives to a token whose log probabilities can be asked for.
MOST_LOGPROBS = 20
#: The most tokens of a prompt that is echoed with its log probabilities: their logits are in memory together.
MOST_ECHOED = 2048
#: The most stop strings of a request, and the longest.
MOST_STOPS, LONGEST_STOP = 16, 500


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: tokens beyond this share of the probability are left out.
        top_k: only so many of the likeliest tokens are left; 0 keeps all.
        seed: of the generator of this request; None takes one that differs from request to request.
        presence_penalty: taken from the logit of each token that the answer has already.
        frequency_penalty: taken from it once for each time.
        bias: added to logits, by token.
        logprobs: how many alternatives each token's log probabilities name; None if nobody asked for any.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, checked.

    Attributes:
        prompt: the text to continue, token ids, or the messages of a chat.
        sampling: how tokens are chosen.
        stops: texts that end the answer.
        ignore_eos: whether the answer goes on behind a token that would end it.
        max_tokens: the most tokens of the answer; None for the server's default.
        stream: whether the answer comes piece by piece.
        usage_in_stream: whether a stream ends with the count of tokens.
        echo: whether a completion begins with its prompt, log probabilities included where they are asked for.
        wish: the precision that is asked for.
    """

    prompt: str | tuple[int, ...] | tuple[Mapping[str, str], ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    stream: bool = False
    usage_in_stream: bool = False
    echo: bool = False
    wish: Wish = field(default_factory=Wish)


def completion_call(body: Mapping[str, Any]) -> Call:
    """The call of a body of `/v1/completions`; raises `RefusedRequest`."""
    _refuse_unknown(body, _COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(one) is int and one >= 0 for one in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise RefusedRequest("prompt is not one text or one list of token ids", parameter="prompt")
    logprobs = _whole(body, "logprobs", 0, MOST_LOGPROBS)
    if body.get("echo") is True and body.get("stream") is True and logprobs is not None:
        raise RefusedRequest("echo with logprobs is not served as a stream", parameter="stream")
    return Call(
        prompt=prompt,
        sampling=_sampling(body, logprobs),
        max_tokens=_whole(body, "max_tokens", 1, 1 << 30),
        echo=_truth(body, "echo"),
        **_shared(body),
    )


def chat_call(body: Mapping[str, Any]) -> Call:
    """The call of a body of `/v1/chat/completions`; raises `RefusedRequest`."""
    _refuse_unknown(body, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedRequest("messages is not a list of at least one message", parameter="messages")
    top = _whole(body, "top_logprobs", 0, MOST_LOGPROBS)
    wants = _truth(body, "logprobs")
    if top is not None and not wants:
        raise RefusedRequest("top_logprobs needs logprobs to be true", parameter="top_logprobs")
    both = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(both) > 1:
        raise RefusedRequest("give max_completion_tokens or max_tokens, not both", parameter="max_tokens")
    return Call(
        prompt=tuple(_message(one, number) for number, one in enumerate(messages)),
        sampling=_sampling(body, (top or 0) if wants else None),
        max_tokens=_whole(body, both[0], 1, 1 << 30) if both else None,
        **_shared(body),
    )


def _message(message: Any, number: int) -> Mapping[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RefusedRequest(f"{where} is not an object with a role", parameter=where)
    unknown = sorted(set(message) - {"role", "content", "name"})
    if unknown:
        raise RefusedRequest(f"{where}.{unknown[0]} is not served", parameter=f"{where}.{unknown[0]}")
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise RefusedRequest(f"{where}.content has a part that is not text", parameter=f"{where}.content")
        content = "".join(str(text) for text in texts)
    if not isinstance(content, str):
        raise RefusedRequest(f"{where}.content is not text", parameter=f"{where}.content")
    return {"role": message["role"], "content": content}


def _sampling(body: Mapping[str, Any], logprobs: int | None) -> Sampling:
    seed = _whole(body, "seed", -(1 << 63), (1 << 63) - 1)
    return Sampling(
        temperature=_number(body, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(body, "top_p", 0.0, 1.0, 1.0),
        top_k=_whole(body, "top_k", 0, 1 << 30) or 0,
        seed=None if seed is None else seed % (1 << 63),
        presence_penalty=_number(body, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=_number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        bias=_bias(body.get("logit_bias")),
        logprobs=logprobs,
    )


def _shared(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both routes have, beside sampling."""
    stream = _truth(body, "stream")
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or not stream):
        raise RefusedRequest("stream_options is not an object of a request that streams", parameter="stream_options")
    unknown = sorted(set(options or ()) - {"include_usage"})
    if unknown:
        raise RefusedRequest(f"stream_options.{unknown[0]} is not served", parameter="stream_options")
    return {
        "stops": _stops(body.get("stop")),
        "ignore_eos": _truth(body, "ignore_eos"),
        "stream": stream,
        "usage_in_stream": _truth(options or {}, "include_usage"),
        "wish": Wish.parse(body.get("precision")),
    }


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    if not good or len(stops) > MOST_STOPS:
        raise RefusedRequest(
            f"stop is not at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", parameter="stop"
        )
    return tuple(stops)


def _bias(value: Any) -> Mapping[int, float]:
    if value is None:
        return MappingProxyType({})
    biases: dict[int, float] = {}
    for key, amount in value.items() if isinstance(value, dict) else [("", None)]:
        is_token = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
        if not is_token or not _is_number(amount) or not -100 <= amount <= 100:
            raise RefusedRequest("logit_bias is not an object of token ids with -100 to 100", parameter="logit_bias")
        biases[int(key)] = float(amount)
    return MappingProxyType(biases)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not _is_number(value) or not low <= value <= high:
        raise RefusedRequest(f"{name} (={value!r}) is not a number from {low:g} to {high:g}", parameter=name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise RefusedRequest(f"{name} (={value!r}) is not a whole number from {low} to {high}", parameter=name)
    return value


def _truth(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedRequest(f"{name} (={value!r}) is not true or false", parameter=name)
    return bool(value)


@dataclass(frozen=True)
class _Fields:
    """The fields of a route: those that are read, and those that pass at a value that asks for nothing."""

    served: frozenset[str]
    neutral: Mapping[str, Callable[[Any], bool]]


_SAMPLING = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
_BOTH = frozenset(("model", "max_tokens", "stream", "stream_options", "stop", "ignore_eos", "precision", *_SAMPLING))
_NOTHING: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: type(value) is int and value == 1,
    "user": lambda value: isinstance(value, str),
}
_COMPLETION = _Fields(
    _BOTH | {"prompt", "echo"},
    {**_NOTHING, "best_of": lambda value: type(value) is int and value == 1, "suffix": lambda value: value == ""},
)
_CHAT = _Fields(
    _BOTH | {"messages", "top_logprobs", "max_completion_tokens"},
    {
        **_NOTHING,
        "response_format": lambda value: value == {"type": "text"},
        "store": lambda value: value is False,
        "tools": lambda value: value == [],
        "tool_choice": lambda value: value == "none",
        "modalities": lambda value: value == ["text"],
    },
)


def _refuse_unknown(body: Mapping[str, Any], fields: _Fields) -> None:
    """Refuse fields that are not served, but for null, and for values that ask for nothing."""
    for name, value in body.items():
        if name in fields.served or value is None or (name in fields.neutral and fields.neutral[name](value)):
            continue
        what = " at this value" if name in fields.neutral else ""
        raise RefusedRequest(f"{name[:80]} is not served{what}", parameter=name[:80])
