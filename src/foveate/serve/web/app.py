"""build_app: the app of transformers' server, with foveate's model, handlers and routes in it.

From transformers come the app with OpenAI's routes, the names of requests, and the list of models. Its routes that load
other models, or unload this one, are taken out, and so are those for speech and responses, which are not served.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState

from foveate.serve.calls.fields import Call, chat_call, completion_call
from foveate.serve.calls.refused import RefusedRequest, error_body
from foveate.serve.engine.engine import Engine
from foveate.serve.web.answers import Answer
from foveate.serve.web.gate import GONE, Gate
from foveate.serve.web.routes import add_routes

#: The routes of transformers' app that stay. Its others load models by name, unload this one, or are not served.
_KEPT = ("/v1/chat/completions", "/v1/completions", "/v1/models")


class OneModel(ModelManager):
    """transformers' manager of models, with the one that is loaded already: nobody can have it load another."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(device="cpu", continuous_batching=True)
        self._engine = engine

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model."""
        length = min(int(self._engine.positions), self._engine.options.limits.cache_tokens)
        return [
            {
                "id": self._engine.options.name,
                "object": "model",
                "created": 0,
                "owned_by": "foveate",
                "max_model_len": length,
            }
        ]

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """The one model and its tokenizer, whatever is asked for."""
        return self._engine.model, self._engine.tokenizer

    def shutdown(self) -> None:
        """Nothing: whoever runs the server ends the engine."""


class Generation(GenerationState):
    """transformers' state of generation, of which the app asks whether it lives."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=True)
        self._engine = engine

    def is_cb_alive(self) -> bool:
        """Whether the engine can compute."""
        return self._engine.alive


class Handler(BaseHandler):
    """Answers one of OpenAI's two routes: reads the body, tokenizes the prompt, and waits for the engine."""

    def __init__(self, engine: Engine, manager: OneModel, state: Generation, chat: bool) -> None:
        super().__init__(manager, state)
        self._engine, self._chat = engine, chat

    async def handle_request(self, body: Mapping[str, Any], request_id: str) -> Response:
        """The answer to a body, as JSON or as server-sent events; raises `RefusedRequest`."""
        engine = self._engine
        wanted = body.get("model")
        if wanted is not None and wanted != engine.options.name:
            raise RefusedRequest(
                f"model (={str(wanted)[:80]!r}) is not served here: {engine.options.name!r} is",
                status=404,
                parameter="model",
            )
        call = chat_call(body) if self._chat else completion_call(body)
        # a long text takes long to tokenize, and others' answers go on meanwhile
        tokens = await asyncio.get_running_loop().run_in_executor(None, self._tokens, call)
        job = engine.submit(call, tokens)
        answer = Answer(engine=engine, job=job, chat=self._chat, id=_name_of(self._chat, request_id))
        if call.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream", headers=answer.headers())
        computed = await _unless_gone(answer)
        return Response(status_code=499) if computed is None else JSONResponse(computed, headers=answer.headers())

    def _tokens(self, call: Call) -> list[int]:
        tokenizer = self._engine.tokenizer
        if isinstance(call.prompt, str):
            return list(tokenizer(call.prompt)["input_ids"])
        if not self._chat:
            return list(cast("tuple[int, ...]", call.prompt))
        if not tokenizer.chat_template:
            raise RefusedRequest("the model has no chat template: use /v1/completions", parameter="messages")
        try:
            encoded = tokenizer.apply_chat_template(
                list(call.prompt), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program of the model's, and refuses what it does not know
            raise RefusedRequest(f"the chat template refuses the messages: {error}", parameter="messages") from error
        return list(encoded["input_ids"])


def _name_of(chat: bool, request_id: str) -> str:
    safe = "".join(c for c in request_id[:64] if c.isascii() and (c.isalnum() or c in "-_"))
    return f"{'chatcmpl' if chat else 'cmpl'}-{safe}"


async def _unless_gone(answer: Answer) -> dict[str, Any] | None:
    """The whole answer; None if the client goes away before."""
    computed = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(GONE.get().wait())
    try:
        await asyncio.wait({computed, gone}, return_when=asyncio.FIRST_COMPLETED)
        return computed.result() if computed.done() else None
    finally:
        for task in (computed, gone):
            if not task.done():
                task.cancel()
        await asyncio.gather(computed, gone, return_exceptions=True)


class _NotServed:
    async def handle_request(self, *_: Any) -> Response:
        raise RefusedRequest("this route is not served", status=404)


def build_app(engine: Engine) -> FastAPI:
    """The app that serves an engine.

    Args:
        engine: a started engine; whoever started it stops it.
    """
    manager, state = OneModel(engine), Generation(engine)
    given = {
        "model_manager": manager,
        "generation_state": state,
        "chat_handler": Handler(engine, manager, state, chat=True),
        "completion_handler": Handler(engine, manager, state, chat=False),
        "enable_cors": False,
    }
    # releases differ in which further handlers the app takes
    names = inspect.signature(build_server).parameters
    others = {name: _NotServed() for name in names if name not in given}
    app: FastAPI = build_server(**{name: value for name, value in (given | others).items() if name in names})
    app.title = "foveate"
    app.router.routes[:] = [one for one in app.router.routes if getattr(one, "path", "") in _KEPT]
    app.add_exception_handler(RefusedRequest, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    add_routes(app, engine)
    app.add_middleware(Gate, most=engine.options.limits.body, key=engine.options.api_key)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedRequest)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _malformed(request: Request, error: Exception) -> Response:
    return JSONResponse(
        error_body("the body is not a JSON object (content-type: application/json)", 400), status_code=400
    )


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)
