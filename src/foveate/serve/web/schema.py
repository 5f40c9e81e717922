"""The OpenAPI schema of the server, at `/openapi.json`: the bodies that it takes, and the statuses of its answers.

FastAPI knows the routes. It does not know the bodies, which are read field by field (`foveate.serve.calls.fields`), so
that what is refused is named. They are written down here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from foveate.serve.calls.fields import LONGEST_STOP, MOST_LOGPROBS, MOST_STOPS

Schema = dict[str, Any]
#: What is refused, and when.
_REFUSALS = {
    "400": "A field is malformed, not served, or beyond a limit; `param` names it.",
    "401": "The key is missing or wrong.",
    "404": "The model is not the one that is served.",
    "405": "The route has no such method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too much waits; `Retry-After` says when to come again.",
    "500": "The engine failed while it computed the answer.",
    "503": "The server is ending, or cannot compute any more.",
}
#: Statuses of requests that have a body.
_OF_BODIES = ("408", "413", "429", "500")
_POINT: Schema = {
    "anyOf": [{"type": "integer", "minimum": 0, "maximum": 255}, {"type": "string", "minLength": 1, "maxLength": 80}]
}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_SHARED: Schema = {
    "model": _TEXT,
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": {"type": "integer", "minimum": 0},
    "seed": _whole(-(1 << 63), (1 << 63) - 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": _number(-100, 100),
    },
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}]},
    "ignore_eos": {"type": "boolean"},
    "stream": {"type": "boolean"},
    "stream_options": _object({"include_usage": {"type": "boolean"}}),
    "precision": _object(
        {
            "tier": {**_POINT, "description": "The index, or the name of a point, at which the answer is read."},
            "floor": {**_POINT, "description": "The furthest index, or the fewest average bits as a text."},
        }
    ),
    "n": {"const": 1},
    "user": _TEXT,
}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_COMPLETION: Schema = _object(
    {
        **{name: _or_null(schema) for name, schema in _SHARED.items()},
        "prompt": {"anyOf": [{"type": "string", "minLength": 1}, _TOKENS]},
        "echo": _or_null({"type": "boolean"}),
        "logprobs": _or_null(_whole(0, MOST_LOGPROBS)),
    },
    "prompt",
)
_PART: Schema = _object({"type": {"const": "text"}, "text": _TEXT}, "type", "text")
_MESSAGE: Schema = _object(
    {"role": _TEXT, "name": _TEXT, "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}}, "role", "content"
)
_CHAT: Schema = _object(
    {
        **{name: _or_null(schema) for name, schema in _SHARED.items()},
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_completion_tokens": _or_null({"type": "integer", "minimum": 1}),
        "logprobs": _or_null({"type": "boolean"}),
        "top_logprobs": _or_null(_whole(0, MOST_LOGPROBS)),
    },
    "messages",
)
_CHANGE: Schema = {
    **_object(
        {
            "index": _or_null(_POINT),
            "hold": {"type": "boolean"},
            "floor": _or_null(_POINT),
            "memory": {"anyOf": [{"type": "integer", "minimum": 1}, _TEXT]},
        }
    ),
    "minProperties": 1,
}
_BODIES = {"/v1/completions": _COMPLETION, "/v1/chat/completions": _CHAT, "/v1/precision": _CHANGE}
_ERROR: Schema = _object(
    {
        "error": _object(
            {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": {"type": "integer"}}, "message"
        )
    },
    "error",
)


def described(app: FastAPI) -> Schema:
    """The schema of an app, with the bodies and refusals of its routes in it."""
    found = FastAPI.openapi(app)
    found["components"] = {"schemas": {"Error": _ERROR}}
    refusals = {
        status: {
            "description": why,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, why in _REFUSALS.items()
    }
    for path, methods in found["paths"].items():
        for method, route in methods.items():
            answers = {status: one for status, one in route["responses"].items() if status != "422"}
            own = refusals if method == "post" else {s: one for s, one in refusals.items() if s not in _OF_BODIES}
            route["responses"] = {**answers, **own}
            if path in ("/v1/completions", "/v1/chat/completions"):  # whole, or as a stream
                route["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
            if path == "/metrics":
                route["responses"]["200"]["content"] = {"text/plain": {"schema": _TEXT}}
            if method == "post" and path in _BODIES:
                route["requestBody"] = {"required": True, "content": {"application/json": {"schema": _BODIES[path]}}}
    return found
