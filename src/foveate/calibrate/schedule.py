"""Quantize in bounded memory: what to keep, what to compute twice, what to collect in a pass of its own.

Beyond the model itself three things take memory, and each can be traded for time:

    what backward keeps    every layer's activations, or those of one block at a time, run twice (`collect.replay`)
    large statistics       a matrix a weight, for all weights at once or for a part of them in each pass over the data
    finished weights       planes beside the float weights until the end, or in place of them at once

Shares are taken from the end of the model to its beginning. The first pass, the only one that needs gradients where
statistics factor, collects all that is small and the first part; each further one runs the model only as far as its
part goes, so that float weights behind it are no longer needed and can make room. The reference of every statistic is
the float model, whichever weights are on planes already, so the result is that of a single pass.

`plan` chooses, by arithmetic alone, the cheapest of these that fits; `Calibration` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.collect.statistics import COVARIANCE_BLOCK

#: Bytes of temporaries that searching grids and scoring take at most.
_TEMPORARIES = 288 << 20
#: Bytes that anything takes: code, small statistics, what allocators keep.
_SLACK = 32 << 20


@dataclass(frozen=True)
class WeightCost:
    """What one weight takes, in bytes, and when it is used.

    Attributes:
        rows, columns: its shape.
        copied: whether its float32 matrix is a copy (another dtype, or another layout).
        floats: of the weight as it is.
        large: of its large statistics.
        gradients: whether these need a backward pass.
        kept: of statistics that are there from the first pass until it is rounded.
        first, last: its first and last place in the order of calls; -1 and the last of all if it was not seen.
    """

    rows: int
    columns: int
    copied: bool
    float_bytes: int
    large_bytes: int
    gradients: bool
    first_call: int
    last_call: int
    kept_bytes: int = 0

    @property
    def plane_bytes(self) -> int:
        """Of all planes, scales and padding."""
        return self.rows * (self.columns + -(-self.columns // 32) * 4)

    @property
    def rounding_bytes(self) -> int:
        """That rounding takes meanwhile: searching and scoring, factoring in double precision, or choosing codes,
        whichever takes most.

        Choosing holds the metric and its factor, and the errors of each thread's rows twice: what is wanted of them,
        and what is taken from that.
        """
        size, matrix = self.rows * self.columns, 4 * self.columns**2 * bool(self.large_bytes)
        errors = (
            2 * 20 * self.columns * min(self.rows, COVARIANCE_BLOCK * torch.get_num_threads()) * bool(self.large_bytes)
        )
        choosing = 2 * matrix + 2 * self.kept_bytes + 6 * size + errors
        most = max(min(_TEMPORARIES, 28 * size), 8 * matrix, choosing)
        # means of the statistics, and the codes
        return matrix + self.kept_bytes + (2 + 4 * self.copied) * size + most


@dataclass(frozen=True)
class Schedule:
    """How to go about it.

    Attributes:
        replay: whether blocks are run twice.
        parts: weights by number, those of the first pass first.
        free_early: whether float weights make room as soon as they are done with.
        peak: bytes beyond the model that it takes at most, as far as can be told.
    """

    replay: bool
    parts: tuple[tuple[int, ...], ...]
    free_early: bool
    peak: int


def make_schedule(costs: Sequence[WeightCost], kept: int, kept_replayed: int, forward: int, room: int) -> Schedule:
    """The cheapest schedule that fits, or the one that takes least if none does.

    Args:
        loads: the weights.
        kept: bytes that backward keeps of a batch.
        kept_replayed: the same when blocks are replayed.
        forward: bytes that a pass without gradients takes.
        room: bytes that there are beyond the model.
    """
    candidates: dict[tuple[tuple[tuple[int, ...], ...], bool, bool], Schedule] = {}
    for count in (*range(1, 17), *range(20, 64, 4), max(len(costs), 64)):
        parts = cut(costs, count)
        for replay in (False, True):
            for free_early in (False, True):
                if (parts, replay, free_early) not in candidates:
                    peak = _peak(costs, parts, kept_replayed if replay else kept, forward, free_early)
                    candidates[parts, replay, free_early] = Schedule(replay, parts, free_early, peak)
    fitting = [schedule for schedule in candidates.values() if schedule.peak <= room]
    if fitting:
        return min(fitting, key=lambda schedule: _relative_time(costs, schedule))
    return min(candidates.values(), key=lambda schedule: schedule.peak)


def cut(costs: Sequence[WeightCost], count: int) -> tuple[tuple[int, ...], ...]:
    """Weights by number in parts of about equal bytes, from the last called to the first."""
    total = sum(cost.large_bytes for cost in costs)
    order = sorted(range(len(costs)), key=lambda i: -costs[i].last_call)
    most = -(-total // count)
    parts: list[list[int]] = [[]]
    filled = 0
    for i in order:
        large = costs[i].large_bytes
        if filled and large and filled + large > most:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += large
    return tuple(map(tuple, parts))


def freed_after(costs: Sequence[WeightCost], parts: Sequence[Sequence[int]], done: int) -> list[int]:
    """The weights, by number, that no pass needs once the first `done` parts are rounded."""
    left = [i for part in parts[done:] for i in part]
    if any(costs[i].gradients for i in left):
        return []  # a backward pass goes through everything
    needed = max((costs[i].last_call for i in left), default=-2)
    return [i for part in parts[:done] for i in part if costs[i].first_call > needed]


def _peak(
    costs: Sequence[WeightCost], parts: Sequence[Sequence[int]], kept: int, forward: int, free_early: bool
) -> int:
    """Bytes beyond the model, at most, while a plan is carried out."""
    held, peak = sum(cost.kept_bytes for cost in costs), 0
    freed: set[int] = set()
    for number, part in enumerate(parts):
        large = sum(costs[i].large_bytes for i in part)
        backward = number == 0 or any(costs[i].gradients for i in part)
        peak = max(peak, held + large + (kept if backward else forward))
        at_once = free_early and number == len(parts) - 1
        for i in part:
            peak = max(peak, held + large + costs[i].rounding_bytes)
            held += costs[i].plane_bytes - (costs[i].float_bytes if at_once else 0)
            large -= costs[i].large_bytes
            freed |= {i} if at_once else set()
        if free_early:
            more = set(freed_after(costs, parts, number + 1)) - freed
            held -= sum(costs[i].float_bytes for i in more)
            freed |= more
    # planes are gathered in blocks at the end, when no float weight is needed any more
    held -= sum(cost.float_bytes for i, cost in enumerate(costs) if i not in freed)
    return _SLACK + max(peak, held + sum(cost.plane_bytes for cost in costs))


@dataclass(frozen=True)
class FurtherPasses:
    """What the passes after the first one take.

    Attributes:
        with_gradients: passes with gradients.
        forward: passes without, as far as each of them goes, with what its statistics take beside the model.
    """

    with_gradients: int
    forward_only: float


def further_passes(costs: Sequence[WeightCost], schedule: Schedule) -> FurtherPasses:
    """The passes after the first one."""
    total = max((cost.last_call for cost in costs), default=0) + 1
    with_gradients, forward = 0, 0.0
    for part in schedule.parts[1:]:
        if any(costs[i].gradients for i in part):
            with_gradients += 1
        else:
            forward += 1.2 * (max(costs[i].last_call for i in part) + 1) / total
    return FurtherPasses(with_gradients, forward)


def _relative_time(costs: Sequence[WeightCost], schedule: Schedule) -> float:
    """Time, in forward passes: one with gradients and statistics takes about five."""
    further = further_passes(costs, schedule)
    # what can be undone is kept if it may be
    return (1 + further.with_gradients) * (5.0 + schedule.replay) + further.forward_only + 0.01 * schedule.free_early
