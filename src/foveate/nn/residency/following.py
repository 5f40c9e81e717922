"""Following free memory: `memory="auto"`. A thread looks once a second, also while the model is idle."""

from __future__ import annotations

import threading
import time
import weakref

import psutil

from foveate.errors import FoveateError
from foveate.memory.available import free_memory
from foveate.memory.policy.limits import AutoLimit, follow
from foveate.nn.residency.registry import ResidentRegistry
from foveate.progress import say
from foveate.sizes import format_bytes, parse_bytes

AUTO = "auto"
#: Seconds between two looks.
EVERY_S = 1.0
#: What is left to others: this share of the machine's memory, and at least so many bytes.
_SHARE, _LEAST_MARGIN = 0.05, 256 << 20


def first_limit(taken: int = 0) -> AutoLimit:
    """The limit to begin with, for a model that takes `taken` bytes now."""
    margin = max(int(_SHARE * psutil.virtual_memory().total), _LEAST_MARGIN)
    return AutoLimit(limit=max(taken + free_memory() - margin, 0), margin=margin, changed_s=time.monotonic())


def limit_of(registry: ResidentRegistry, memory: int | str) -> int:
    """The limit in bytes that an argument `memory` says now, and whether it is followed from now on."""
    if memory != AUTO:
        limit = parse_bytes(memory)
        stop_following(registry)
        return limit
    start_following(registry)
    assert registry.auto is not None
    return max(registry.auto.limit, registry.residency.needs)


def start_following(registry: ResidentRegistry) -> None:
    """Look at free memory once a second from now on."""
    running = registry.auto is not None
    registry.auto = first_limit(registry.residency.report().taken)
    if not running:
        reference = weakref.ref(registry)
        threading.Thread(target=_look_for_ever, args=(reference,), name="foveate-memory", daemon=True).start()


def stop_following(registry: ResidentRegistry) -> None:
    """Look no more."""
    registry.auto = None


def _look_for_ever(reference: weakref.ref[ResidentRegistry]) -> None:
    while True:
        time.sleep(EVERY_S)
        registry = reference()
        if registry is None or registry.auto is None:
            return
        look(registry, free_memory(), time.monotonic())
        del registry


def look(registry: ResidentRegistry, free: int, now_s: float) -> None:
    """One look: take another limit if `free` bytes of memory say so. Eviction stops at the standing floor."""
    before = registry.auto
    if before is None:
        return
    after = follow(before, free=free, taken=registry.residency.report().taken, now_s=now_s)
    registry.auto = after
    if after is before:
        return
    least = registry.residency.needs
    if after.limit < least <= before.limit:
        say(
            f"memory is short: {format_bytes(after.limit)} would be left to a model whose standing floor needs "
            f"{format_bytes(least)}, and which keeps those"
        )
    try:
        registry.resize(max(after.limit, least))
    except FoveateError as error:  # this thread has no caller to tell
        say(f"memory could not be resized: {error}")
