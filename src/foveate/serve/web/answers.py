"""Answers: the tokens of a job as OpenAI's objects, whole or as server-sent events, with the precision that it got.

Beside OpenAI's fields an answer has `precision` (`Given.report`), and its last event has it where it streams. The
headers `x-foveate-tier`, `x-foveate-bits` and `x-foveate-switches` say the same of an answer as a whole. A stream's
headers go out first, and have the tier and the bits of the moment at which it begins.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from foveate.serve.calls.refused import RefusedRequest, error_body
from foveate.serve.calls.text import TextStream
from foveate.serve.engine.engine import Engine
from foveate.serve.engine.jobs import Ended, Job
from foveate.serve.engine.sampling import Chosen

#: Seconds that the log probabilities of a prompt may take, other prompts before it included.
_PROMPT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: some text, the tokens that made it certain, and at the end the reason."""

    text: str = ""
    chosen: tuple[Chosen, ...] = ()
    reason: str | None = None
    error: str | None = None


async def pieces(engine: Engine, job: Job) -> AsyncGenerator[Piece, None]:
    """The parts of an answer as they come. If they are not all taken, the job is cancelled."""
    stream = TextStream(engine.tokenizer, job.call.stops)
    done = False
    try:
        while not done:
            event = await job.events.get()
            if isinstance(event, Ended):
                done = True
                yield Piece(text=stream.end(), reason="stop" if stream.stopped else event.reason, error=event.error)
                continue
            text = stream.feed(event.token)
            if stream.stopped:
                done = True
                engine.metrics.ended(job, "stop", time.monotonic())
                engine.cancel(job)
            yield Piece(text=text, chosen=(event,), reason="stop" if stream.stopped else None)
    finally:
        if not done:
            engine.metrics.ended(job, "abort")
            engine.cancel(job)


@dataclass(kw_only=True)
class Answer:
    """One answer in the making.

    Attributes:
        engine: what computes it.
        job: what is computed.
        chat: whether it is a chat's message; else a completion.
        id: the name of the answer.
        created: the time, in seconds since 1970.
    """

    engine: Engine
    job: Job
    chat: bool
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def precision(self) -> dict[str, Any]:
        """What precision the answer got so far."""
        return self.job.given.report(self.job.call.wish)

    def headers(self) -> dict[str, str]:
        """The headers that say it. Before the first pass they say what would be read at this moment."""
        got, control = self.precision(), self.engine.control
        begun = got["bits"] is not None
        request = self.job.request
        now = control.index if request is None or request.tier is None else request.tier
        return {
            "x-foveate-tier": str(got["tier"] if begun or got["tier"] == "auto" else now),
            "x-foveate-bits": str(got["bits"] if begun else round(control.read_bits(now), 4)),
            "x-foveate-switches": str(got["switches"]),
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object; raises `RefusedRequest` with status 500 if the engine failed."""
        text, reason = "", "stop"
        chosen: list[Chosen] = []
        async with aclosing(pieces(self.engine, self.job)) as parts:
            async for piece in parts:
                if piece.error is not None:
                    raise RefusedRequest(f"the engine failed: {piece.error}", status=500)
                text += piece.text
                chosen.extend(piece.chosen)
                reason = piece.reason or reason
        if self.job.call.echo:
            text = self._prompt_text() + text
            if self.job.call.sampling.logprobs is not None:
                chosen = await self._prompt_chosen() + chosen
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(chosen)}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head(""), "choices": [choice], "usage": self._usage(), "precision": self.precision()}

    async def _prompt_chosen(self) -> list[Chosen]:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.engine.ask_logprobs(self.job)), _PROMPT_SECONDS)
        except Exception as error:  # a model's, or the engine has ended
            raise RefusedRequest(f"the engine failed: {error!r}", status=500) from error

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        if self.chat:
            yield self._event({"role": "assistant", "content": ""}, None)
        elif self.job.call.echo:
            yield self._event(self._prompt_text(), None)
        async with aclosing(pieces(self.engine, self.job)) as parts:
            async for piece in parts:
                if piece.error is not None:
                    yield _sse(error_body(f"the engine failed: {piece.error}", 500))
                    break
                if piece.text or (piece.chosen and self.job.call.sampling.logprobs is not None):
                    yield self._event({"content": piece.text} if self.chat else piece.text, None, piece.chosen)
                if piece.reason is not None:
                    yield self._event({} if self.chat else "", piece.reason, last={"precision": self.precision()})
                    if self.job.call.usage_in_stream:
                        yield _sse({**self._head(".chunk"), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(
        self,
        content: Any,
        reason: str | None,
        chosen: tuple[Chosen, ...] = (),
        last: Mapping[str, Any] | None = None,
    ) -> str:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": reason,
            "logprobs": self._logprobs(list(chosen)) if chosen else None,
        }
        choice["delta" if self.chat else "text"] = content
        usage = {"usage": None} if self.job.call.usage_in_stream else {}
        return _sse({**self._head(".chunk"), "choices": [choice], **usage, **(last or {})})

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.engine.options.name}

    def _usage(self) -> dict[str, int]:
        prompt, answer = len(self.job.tokens), self.job.produced
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _prompt_text(self) -> str:
        return str(self.engine.tokenizer.decode(list(self.job.tokens)))

    def _token_text(self, token: int) -> str:
        return str(self.engine.tokenizer.decode([token]))

    def _logprobs(self, chosen: list[Chosen]) -> dict[str, Any] | None:
        """OpenAI's two forms of log probabilities."""
        if self.job.call.sampling.logprobs is None:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(one) for one in chosen], "refusal": None}
        texts = [self._token_text(one.token) for one in chosen]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [None if one.logprob is None else self._by_text(one.alternatives) for one in chosen],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
        }

    def _by_text(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log probabilities by the texts of tokens, or by their ids where a text is taken (parts of characters)."""
        found: dict[str, float] = {}
        for token, logprob in pairs:
            text = self._token_text(token)
            found[f"token_id:{token}" if text in found else text] = logprob
        return found

    def _chat_logprob(self, one: Chosen) -> dict[str, Any]:
        def named(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {**named(one.token, one.logprob), "top_logprobs": [named(*pair) for pair in one.alternatives]}


def _sse(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
