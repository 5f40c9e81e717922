"""`foveate serve`: an OpenAI-compatible server whose precision bends under load."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

import foveate as fv
from foveate.cli.shared import options
from foveate.cli.shared.console import log
from foveate.cli.shared.data import price_batches
from foveate.cli.shared.models import config_of, is_causal, load_tokenizer
from foveate.errors import BudgetError, DataError

_ENVIRONMENT_KEY = "FOVEATE_API_KEY"


def serve(
    out: options.Folder,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network that this machine is on.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    limits: Annotated[
        str,
        typer.Option(
            help="What the runtime manager keeps to by moving precision, NAME=VALUE,...; none for no manager."
        ),
    ] = "queue_wait=500ms",
    name: Annotated[str | None, typer.Option(help="The model's name in requests. Default: the folder's.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What the model may take, such as 6GiB, or auto; the rest of its planes stay on disk."),
    ] = None,
    adapt: Annotated[
        Path | None,
        typer.Option(
            help="Text like the requests': each token then chooses between two maps around the index in force."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Move bits to the weights that the requests need, for the same bytes.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are computed together.")] = 8,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one step computes.")] = 256,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Tokens whose keys and values are kept.")] = 8192,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 256,
    waiting_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts that may wait; more get 429.")] = 16384,
    body: Annotated[int, typer.Option(min=1, help="Bytes of a request, at most.")] = 1 << 20,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on after SIGTERM.")] = 30.0,
    manager_log: Annotated[
        Path | None, typer.Option("--log", help="File for every observation and decision of the manager.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients. Precision bends under load, and each answer says what it got.

    The page at / shows it live. With FOVEATE_API_KEY set, requests must carry that key.
    """
    from foveate.serve.extras import require_serving

    require_serving()
    from foveate.runtime import Limits, ManagerOptions
    from foveate.serve.options import ADAPTING_POINTS, FOLLOW, ServeOptions, ServerLimits, default_name
    from foveate.serve.run import made_engine
    from foveate.serve.run import serve as run

    fv.read_head(out)
    if not is_causal(config_of(str(out))):
        raise DataError(f"{out} holds no model that predicts the next token")
    check_free(host, port)
    key = os.environ.get(_ENVIRONMENT_KEY) or None
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("anybody who reaches %s may use this server: %s is not set", host, _ENVIRONMENT_KEY)
    tokenizer = load_tokenizer(str(out), "copy the original model's tokenizer files into it")
    if not getattr(tokenizer, "is_fast", False):
        raise BudgetError(f"the tokenizer of {out} is not a fast one, which streaming needs")
    settings = ServeOptions(
        name=name or default_name(out),
        adapt_on=() if adapt is None else price_batches(adapt, out),
        follow=FOLLOW if follow else None,
        points=16 if adapt is None else ADAPTING_POINTS,
        bend=None if limits.strip() == "none" else Limits.parse(limits),
        limits=ServerLimits(
            batch=batch,
            batch_tokens=batch_tokens,
            cache_tokens=cache_tokens,
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            body=body,
        ),
        manager=ManagerOptions(background=False, log=manager_log),
        api_key=key,
        drain_seconds=drain,
    )
    log.info("loading %s", out)
    engine = made_engine(fv.load(out, memory=memory), tokenizer, settings, whole=memory is None)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shown = f"[{host}]" if ":" in host else host
    run(
        engine,
        host=host,
        port=port,
        told=lambda taken: log.info("serving %s at http://%s:%d/", settings.name, shown, taken),
    )


def check_free(host: str, port: int) -> None:
    """Raise `DataError` before the work if nobody can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise DataError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
