"""Gate: what a request passes before the app sees it, as plain ASGI: who may call, how much it may send, and whether
the client is still there.

The gate reads the body itself, so that a body beyond the limit is refused before it is in memory, and then watches the
connection: a client that goes away is known at once, also while its answer is still computed as a whole.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from foveate.serve.calls.refused import RefusedRequest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Set when the client of this request has gone away.
GONE: ContextVar[asyncio.Event] = ContextVar("GONE")
#: What an API key is not asked for: orchestrators and scrapers have none, and the page has a field for it, and no data.
OPEN_PATHS = ("/", "/health", "/ready", "/metrics")
#: Seconds that a body may take to arrive.
_BODY_SECONDS = 30.0


class Gate:
    """An ASGI app before another.

    Args:
        app: what serves the requests that pass.
        most: bytes of a body, at most.
        key: the API key that is asked for; None asks for none.
    """

    def __init__(self, app: App, most: int, key: str | None) -> None:
        self._app, self._most, self._key = app, most, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_key(scope["path"], headers)
            body = await asyncio.wait_for(self._body(headers, receive), _BODY_SECONDS)
        except (RefusedRequest, asyncio.TimeoutError) as error:
            late = RefusedRequest("the body did not arrive in time", status=408)
            await _refuse(error if isinstance(error, RefusedRequest) else late, send)
            return
        if body is None:
            return
        gone = asyncio.Event()
        watch = asyncio.ensure_future(_watch(receive, gone))
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        token = GONE.set(gone)
        try:
            await self._app(scope, replay, send)
        finally:
            GONE.reset(token)
            watch.cancel()

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):
            raise RefusedRequest("the API key is missing or wrong", status=401)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client went away before it was there."""
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > self._most:
            raise RefusedRequest(f"the body has {told} bytes, and at most {self._most} are taken", status=413)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._most:
                raise RefusedRequest(f"the body has more than {self._most} bytes, the most that are taken", status=413)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _refuse(refused: RefusedRequest, send: Send) -> None:
    body = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs = [(name.encode(), value.encode()) for name, value in (headers | refused.headers).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
