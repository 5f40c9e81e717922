"""ServerLimits and ServeOptions: what a server accepts, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import BudgetError
from foveate.importance import Shadow, TrackingOptions
from foveate.runtime import Limits, ManagerOptions


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a server accepts. What is beyond is refused at once, with a status that says what to do.

    Attributes:
        body: bytes of a request's body (413 beyond).
        answer_tokens: the most tokens of one answer (400 beyond).
        default_tokens: tokens of an answer whose request does not say how many.
        waiting_tokens: prompt tokens that may wait (429 beyond, with Retry-After).
        waiting: requests that may wait (429 beyond).
        batch: requests that are computed together.
        batch_tokens: tokens that one step computes, of prompts and answers together.
        cache_tokens: tokens whose keys and values are kept, of all requests together; at most so many are in one
            request's prompt and answer (400 beyond).
    """

    body: int = 1 << 20
    answer_tokens: int = 4096
    default_tokens: int = 256
    waiting_tokens: int = 16384
    waiting: int = 256
    batch: int = 8
    batch_tokens: int = 256
    cache_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BudgetError(f"{name} (={value!r}) is not a whole number of at least 1")
        if self.batch_tokens < self.batch:
            raise BudgetError(f"batch_tokens (={self.batch_tokens}) is less than batch (={self.batch})")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server is run.

    Attributes:
        name: what the model is called in requests and answers.
        limits: what it accepts.
        bend: the limits that the runtime manager keeps by moving along the frontier; None leaves the index to the
            operator.
        manager: how the manager works. It decides between two steps, so `background` is set to False.
        api_key: if given, requests must carry it as a bearer token; health, readiness and metrics need none.
        drain_seconds: how long answers may go on after a signal to end.
        points: maps of the frontier that is made where the folder stores none.
        adapt_on: batches on which the price of a byte is found, for inputs that choose their precision around the
            index in force (`foveate.adapt_to_input`); none if they do not.
        follow: how the importance of weights is followed (`foveate.track_importance`); None if it is not.
    """

    name: str
    limits: ServerLimits = field(default_factory=ServerLimits)
    bend: Limits | None = field(default_factory=lambda: Limits(queue_wait=0.5))
    manager: ManagerOptions = field(default_factory=lambda: ManagerOptions(background=False))
    api_key: str | None = None
    drain_seconds: float = 30.0
    points: int = 16
    adapt_on: Sequence[Any] = ()
    follow: TrackingOptions | None = None

    def __post_init__(self) -> None:
        if self.follow is not None and not self.follow.by_hand:
            raise BudgetError("follow has by_hand=False: a server decides between its steps, give by_hand=True")
        if not self.name or len(self.name) > 200 or not self.name.isprintable():
            raise BudgetError(f"name (={self.name!r}) is not a printable text of 1 to 200 characters")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise BudgetError("api_key is not printable ASCII text")
        if not 0 <= self.drain_seconds < float("inf"):
            raise BudgetError(f"drain_seconds (={self.drain_seconds}) is not a finite number of at least 0")
        if not 2 <= self.points <= 255:
            raise BudgetError(f"points (={self.points}) is not a number of maps from 2 to 255")


def default_name(folder: Path) -> str:
    """What a model is called if nobody says otherwise: its folder's name."""
    return folder.resolve().name or "foveate"


#: How a server follows importance unless told otherwise. All requests wait for a shadow run, so its calls are short.
FOLLOW = TrackingOptions(decide_every=8192, shadow=Shadow(calls=4, tokens=96), by_hand=True)

#: Maps of a frontier by the profile where inputs choose between neighbours: near ones, for wide pairs lose.
ADAPTING_POINTS = 32
