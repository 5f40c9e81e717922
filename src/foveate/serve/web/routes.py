"""The routes that OpenAI does not have: precision, health and readiness, metrics, the page and its events."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from foveate.errors import FoveateError
from foveate.serve.calls.refused import RefusedRequest
from foveate.serve.calls.wish import Wish, floor_of
from foveate.serve.engine.engine import Engine
from foveate.serve.engine.metrics import Gauges
from foveate.serve.web.gate import GONE
from foveate.serve.web.schema import described

T = TypeVar("T")
#: Seconds from one event of the page to the next.
_EVENT_EVERY = 0.5
#: Seconds that a change may wait for the step that runs.
_CHANGE_SECONDS = 30.0


def add_routes(app: FastAPI, engine: Engine) -> None:
    """Add the routes to an app."""

    @app.get("/health")
    def health() -> Response:
        """Whether the server computes (200) or has failed (503)."""
        return _status(engine.alive, "the engine cannot compute any more")

    @app.get("/ready")
    def ready() -> Response:
        """Whether the server takes requests (200), or is ending or failed (503)."""
        return _status(engine.alive and not engine.draining, "the server takes no requests")

    @app.get("/metrics")
    def metrics() -> Response:
        """What Prometheus reads."""
        return Response(engine.metrics.text(gauges(engine)), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/precision")
    def precision() -> dict[str, Any]:
        """The frontier, the index in force, and who holds it."""
        return engine.control.status()

    @app.post("/v1/precision")
    async def change(body: dict[str, Any]) -> dict[str, Any]:
        """Hold an index, give it back, set a floor, or the memory of the model: `{"index": 3}`, `{"hold": false}`,
        `{"floor": "4.25"}`, `{"memory": "300MiB"}`.
        """
        change_precision(engine, body)
        changed: dict[str, Any] = await _between_steps(engine, partial(_changed, engine, body))
        return changed

    @app.get("/openapi.json", include_in_schema=False)
    def schema() -> dict[str, Any]:
        """What the server takes and answers, as OpenAPI has it."""
        return described(app)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> HTMLResponse:
        """The built-in page."""
        text = resources.files("foveate.serve.web").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(text, headers={"content-security-policy": policy, "x-frame-options": "DENY"})

    @app.get("/events", include_in_schema=False)
    async def events() -> StreamingResponse:
        """What the page shows, as server-sent events, one at once and then two a second."""
        return StreamingResponse(_events(engine, GONE.get()), media_type="text/event-stream")


def _status(good: bool, why: str) -> Response:
    return JSONResponse({"status": "ok"} if good else {"status": "unavailable", "reason": why}, 200 if good else 503)


def change_precision(engine: Engine, body: Mapping[str, Any]) -> None:
    """Check a body of `POST /v1/precision`; raises `RefusedRequest`."""
    unknown = sorted(set(body) - {"index", "hold", "floor", "memory"})
    if unknown or not body:
        why = f"{unknown[0]} is not one of index, hold, floor and memory" if unknown else "the body is empty"
        raise RefusedRequest(why)
    memory = body.get("memory", "auto")
    if isinstance(memory, bool) or not isinstance(memory, (int, str)):
        raise RefusedRequest("memory is neither a number of bytes nor a text such as 300MiB", parameter="memory")
    if "hold" in body and not isinstance(body["hold"], bool):
        raise RefusedRequest("hold is not true or false", parameter="hold")
    if body.get("index") is not None and body.get("hold") is False:
        raise RefusedRequest("index holds, and hold is false", parameter="hold")
    for name, key in (("index", "tier"), ("floor", "floor")):
        try:
            Wish.parse({key: body[name]} if body.get(name) not in (None, "auto") else None).on(
                engine.control.frontier, engine.control.names
            )
        except RefusedRequest as error:
            raise RefusedRequest(str(error).replace(f"precision.{key}", name), parameter=name) from error


def _changed(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a change that was checked; called between two steps."""
    control = engine.control
    if "memory" in body:
        control.resize(body["memory"])
    if "floor" in body:
        floor = body["floor"]
        control.stand(None if floor is None else floor_of(floor, control.frontier, control.names))
    if body.get("index") is not None:
        wanted = Wish(tier=body["index"]).on(control.frontier, control.names)
        control.hold(None if wanted is None else wanted.tier)
    elif "index" in body or body.get("hold") is False:
        control.hold(None)
    elif body.get("hold"):
        control.hold(control.index)
    return control.status()


async def _between_steps(engine: Engine, change: Callable[[], T]) -> T:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(engine.ask(change)), _CHANGE_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedRequest("the step that runs has not ended in time", status=503) from None
    except FoveateError as error:
        raise RefusedRequest(str(error), status=400 if engine.alive else 503) from error


def gauges(engine: Engine) -> Gauges:
    """The values of the moment."""
    running, waiting, tokens = engine.jobs.counts()
    control = engine.control
    plan = control.frontier[control.index]
    values = {
        "num_requests_running": ("Requests that are computed.", float(running)),
        "num_requests_waiting": ("Requests that wait.", float(waiting)),
        "waiting_tokens": ("Tokens of the prompts that wait.", float(tokens)),
        "kv_cache_usage_perc": ("Share of the cache of keys and values in use, 0 to 1.", engine.cache_usage),
        "prefill_tokens_per_second": ("Tokens of prompts a second, as measured.", engine.jobs.prefill_rate or 0.0),
        "frontier_index": ("Index of the frontier in force; 0 is the best.", float(control.index)),
        "effective_bits": ("Average bits of a weight that are read.", control.read_bits(control.index)),
        "precision_held": ("1 while the operator holds the index.", float(control.held is not None)),
        "manager_fault": ("1 if the runtime manager no longer decides.", float(bool(control.fault))),
    }
    chosen, tracker = control.deciders.mean_bits, control.deciders.tracker
    if chosen is not None:
        values["chosen_bits"] = ("Average bits of a weight that tokens chose lately.", chosen)
    if tracker is not None:
        verdict = tracker.verdict
        values["importance_moves"] = ("Moves of bits to what requests need.", float(verdict.moves))
        values["importance_tokens"] = ("Tokens whose importance was followed.", float(verdict.tokens))
    resident = control.resident_bytes
    if resident is not None:
        values["planes_resident_bytes"] = ("Bytes of planes in memory.", float(resident))
    status = _manager_status(engine)
    credit = status.get("credit")
    if credit is not None and math.isfinite(credit):
        values["quality_budget_remaining"] = ("Nats of the quality budget that are left.", float(credit))
    for name, reading in status.get("readings", {}).items():
        if reading["value"] is not None:
            values[f"sensor_{name}"] = ("What the sensor said last.", float(reading["value"]))
    layers = {site.name.removesuffix(":weight"): plan.mean_level(site) for site in plan.weight_sites()}
    return Gauges(values=values, layers=layers, switches=dict(control.switches), refused=engine.jobs.refused)


def _manager_status(engine: Engine) -> dict[str, Any]:
    return {} if engine.control.manager is None else engine.control.manager.status()


def snapshot(engine: Engine) -> dict[str, Any]:
    """What one event of the page has."""
    control = engine.control
    plan = control.frontier[control.index]
    now = gauges(engine)
    status = _manager_status(engine)
    return {
        "model": engine.options.name,
        "precision": control.status(),
        "values": {name: value for name, (_, value) in now.values.items()},
        "layers": [[site.name.removesuffix(":weight"), plan.mean_level(site)] for site in plan.weight_sites()],
        "sensors": status.get("readings", {}),
        "limits": status.get("limits", {}),
        "decisions": [
            {"at": d.at, "before": d.before, "index": d.index, "by": d.by, "reason": d.reason}
            for d in list(control.decisions)[-20:]
        ],
        "draining": engine.draining,
    }


async def _events(engine: Engine, gone: asyncio.Event) -> AsyncGenerator[str, None]:
    while not gone.is_set() and not engine.draining:
        yield f"data: {json.dumps(snapshot(engine), allow_nan=False)}\n\n"
        try:
            await asyncio.wait_for(gone.wait(), _EVENT_EVERY)
        except asyncio.TimeoutError:
            continue
