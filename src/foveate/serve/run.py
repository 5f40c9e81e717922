"""serve: load a folder, serve it until a signal says to end, and let what is on its way end first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from torch import nn

from foveate.serve.engine.control import served_frontier
from foveate.serve.engine.engine import Engine, warm_up
from foveate.serve.options import ServeOptions
from foveate.serve.web.app import build_app

_log = logging.getLogger("foveate")


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which tells the engine when it begins to end."""

    engine: Engine

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal ends gently, a second one at once.

        The signal is not raised again afterwards, as uvicorn does: that would end the process before its engine.
        """
        _log.info("ending: %d requests are on their way", len(self.engine.jobs.all()))
        self.force_exit = self.should_exit
        self.should_exit = self.engine.draining = True


def made_engine(model: nn.Module, tokenizer: Any, options: ServeOptions, whole: bool = True) -> Engine:
    """An engine for a model, on the frontier of its folder or of its profile.

    Args:
        model: a quantized model with its profile.
        tokenizer: its fast tokenizer.
        options: how it is served.
        whole: whether every plane is loaded.
    """
    engine = Engine(model, tokenizer, served_frontier(model, options.points, whole), options)
    warm_up(engine)
    return engine


def serve(
    engine: Engine, *, host: str = "127.0.0.1", port: int = 8000, told: Callable[[int], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, and then until what is on its way has ended.

    Args:
        engine: what computes; it is started and stopped here.
        host, port: where to listen; port 0 takes a free one.
        told: called with the port once the server listens.
    """
    options = engine.options
    engine.start()
    try:
        config = uvicorn.Config(
            build_app(engine),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
            timeout_keep_alive=30,
            server_header=False,
        )
        server = DrainingServer(config)
        server.engine = engine
        if told is not None:
            threading.Thread(target=_tell, args=(server, told), daemon=True).start()
        server.run()
    finally:
        engine.stop(options.drain_seconds)


def _tell(server: DrainingServer, told: Callable[[int], None]) -> None:
    while not server.started and not server.should_exit:
        threading.Event().wait(0.02)
    if server.started:
        told(server.servers[0].sockets[0].getsockname()[1])


@contextmanager
def in_background(engine: Engine, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Serve in a thread within this context, and end as `serve` does; yields the port.

    Args:
        engine: what computes; it is started and stopped here.
        host, port: where to listen; port 0 takes a free one.

    Raises:
        OSError: it cannot listen there.
    """
    engine.start()
    config = uvicorn.Config(build_app(engine), host=host, port=port, log_level="warning", access_log=False)
    server = DrainingServer(config)
    server.engine = engine
    thread = threading.Thread(target=server.run, name="foveate-server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OSError(f"cannot listen at {host}:{port}")
            thread.join(0.01)
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = engine.draining = True
        thread.join(engine.options.drain_seconds + 5)
        engine.stop(engine.options.drain_seconds)
