"""Following the memory that is free: the limit of `memory="auto"`. Pure; the clock and the machine are handed in.

A store of fixed size that is larger than free memory makes the machine swap. So the limit falls at once when memory
gets short. It rises only after things were quiet for a while. Each time that a rise had to be taken back the wait
doubles, up to ten minutes: two processes that follow the same memory must not chase each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import FoveateError

#: Seconds of quiet before the limit rises: at first, and at most.
FIRST_HOLD_S, LONGEST_HOLD_S = 5.0, 600.0
#: A rise that is taken back within this many seconds doubles the wait.
_RECENT_S = 60.0
#: The share of the limit by which more must be free before it rises.
_STEP = 0.05


@dataclass(frozen=True, kw_only=True)
class AutoLimit:
    """The limit in force, in bytes, and what led to it.

    Attributes:
        limit: bytes that the model may take.
        margin: bytes of the machine's free memory that are left to others.
        hold_s: seconds of quiet before the limit rises.
        changed_s: when it last changed, on the clock that `follow` is given.
        rose_s: when it last rose.
    """

    limit: int
    margin: int
    hold_s: float = FIRST_HOLD_S
    changed_s: float = 0.0
    rose_s: float = float("-inf")

    def __post_init__(self) -> None:
        if self.limit < 0 or self.margin < 0 or self.hold_s <= 0:
            raise FoveateError(
                f"limit (={self.limit}) and margin (={self.margin}) must not be negative, and hold_s (={self.hold_s}) "
                "must be positive"
            )


def follow(state: AutoLimit, *, free: int, taken: int, now_s: float) -> AutoLimit:
    """The limit after a look at the machine.

    Args:
        state: the limit in force.
        free: bytes that this process could still take (`foveate.memory.available.free_memory`).
        taken: bytes that the model takes now.
        now_s: seconds, on any clock that does not go back.
    """
    possible = max(taken + free - state.margin, 0)
    if possible < state.limit:
        again = now_s - state.rose_s < _RECENT_S
        hold = min(2 * state.hold_s, LONGEST_HOLD_S) if again else state.hold_s
        return AutoLimit(limit=possible, margin=state.margin, hold_s=hold, changed_s=now_s, rose_s=state.rose_s)
    if possible > (1 + _STEP) * state.limit and now_s - state.changed_s >= state.hold_s:
        calm = now_s - state.rose_s > 2 * LONGEST_HOLD_S
        hold = FIRST_HOLD_S if calm else state.hold_s
        return AutoLimit(limit=possible, margin=state.margin, hold_s=hold, changed_s=now_s, rose_s=now_s)
    return state
